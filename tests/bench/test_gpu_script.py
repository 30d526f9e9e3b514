"""bench/gpu.sh with a stand-in for Python: every stage is called, and one that fails costs itself alone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from paths import ROOT

STAND_IN = f"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[[ "$*" == "-m bench.report.digest"* ]] && exec {sys.executable} "$@"
[[ -n $FAILS && "$*" =~ $FAILS ]] && echo planted && exit 3
[[ -n $HANGS && "$*" =~ $HANGS ]] && sleep 1000
exit 0
"""
OPERATORS = ("gram", "gram_conv", "gram_embedding", "gram_hadamard", "combine", "combine_conv")
OPERATORS += ("combine_embedding", "scale_bias", "solve")
FIRST = (
    *("ceilings", "extension", "compile", "solves"),
    *(f"{stage}-{network}" for stage in ("steps", "profile") for network in ("resnet", "transformer")),
    *(f"gate-{operator}" for operator in OPERATORS),
    *(f"kernels-{operator}" for operator in ("gram", "gram_conv", "combine", "gram_embedding", "solve")),
)
SECOND = (
    *("extension", "tests-kernels", "tests-device"),
    *(f"peers-{network}" for network in ("resnet", "transformer")),
    *(f"peers-{name}-{network}" for name in ("kfac", "shampoo") for network in ("resnet", "transformer")),
)
THIRD = (
    *("extension", "decode"),
    *(f"train-images-{method}" for method in ("sgd", "adamw", "fngd", "fngd-exact")),
    *(f"train-sentences-{method}" for method in ("adamw", "fngd-adamw")),
)


@pytest.fixture
def checkout(tmp_path):
    """A copy as it is sent to another machine: without history, with what was packed."""
    root = tmp_path / "checkout"
    for name in ("gpu.sh", "gpu", "__init__.py", "report", "kernels", "tools"):
        source, target = ROOT / "bench" / name, root / "bench" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (root / "build").mkdir()
    (root / "build" / "sources.sha256").write_text(checksum(root / "bench/gpu.sh", "bench/gpu.sh"))
    python = root / "python3"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return root


def checksum(path, name):
    return (
        subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0] + f"  {name}\n"
    )


def command(checkout, part, **variables):
    environment = {
        **os.environ,
        **{"PYTHON": str(checkout / "python3"), "CALLS": str(checkout / "calls"), "FAILS": "", "HANGS": ""},
        "DRY": "1",
        "GIT_CEILING_DIRECTORIES": str(checkout.parent),
        **variables,
    }
    environment.pop("PYTHONPATH", None)
    return {"args": [checkout / "bench/gpu.sh", part, checkout / "out"], "env": environment, "text": True}


def run(checkout, part, **variables):
    done = subprocess.run(**command(checkout, part, **variables), capture_output=True, timeout=100)
    stages = dict(re.findall(r"^== ([\w-]+): (ok|FAILED|no time|left out)", done.stdout, re.MULTILINE))
    return done, stages


def packed(checkout):
    assert len(list((checkout / "out").iterdir())) <= 8
    with tarfile.open(checkout / "out/logs.tar.gz") as archive:
        return {Path(name).stem for name in archive.getnames() if name.endswith(".log")}


@pytest.mark.parametrize(("part", "names"), [("first", FIRST), ("second", SECOND), ("third", THIRD)])
def test_every_stage_is_called_and_packed(part, names, checkout):
    done, stages = run(checkout, part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert stages == dict.fromkeys(names, "ok")
    assert packed(checkout) == set(names)
    # The digest is printed by the copy's own modules.
    assert "Error" not in done.stderr


PLANTED = {
    "bench.kernels.ceilings": {"ceilings"},
    "--shapes .combine_conv.*--gate|--gate.*--shapes .combine_conv": {"gate-combine_conv"},
    "bench.steps .*--network resnet": {"steps-resnet"},
    "bench.kernels.solves": {"solves"},
    "bench.kernels .*gram_conv.*--first": {"kernels-gram_conv"},
    "bench.steps.profile .*transformer": {"profile-transformer"},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_failure_in_the_first_call_costs_its_stage_alone(planted, checkout):
    done, stages = run(checkout, "first", FAILS=planted)
    assert done.returncode == 1
    failed = {name for name, outcome in stages.items() if outcome != "ok"}
    assert failed == PLANTED[planted]
    assert done.stdout.splitlines()[-2] == f"failed: {' '.join(sorted(failed))} "
    assert "planted" in done.stdout
    assert packed(checkout) == set(FIRST)


@pytest.mark.parametrize(
    ("part", "names", "name", "planted"),
    [
        ("second", SECOND, "peers-kfac-resnet", "bench.peers .*resnet .*kfac"),
        ("second", SECOND, "tests-kernels", "pytest .* tests/kernels/triton_backend --ignore"),
        ("third", THIRD, "train-images-fngd-exact", "optimizer fngd-exact"),
        ("third", THIRD, "decode", "workloads.load"),
    ],
)
def test_a_failure_in_a_later_call_costs_its_stage_alone(part, names, name, planted, checkout):
    done, stages = run(checkout, part, FAILS=planted)
    assert done.returncode == 1
    assert stages == dict.fromkeys(names, "ok") | {name: "FAILED"}
    assert packed(checkout) == set(names)


def test_an_operator_that_fails_its_gate_is_not_timed(checkout):
    run(checkout, "first", FAILS="--gate.*--shapes .(combine|gram_conv)[(]")
    calls = (checkout / "calls").read_text()
    timed = re.findall(r"--shapes \^\(([\w|]+)\)", calls)
    assert timed == [
        "gram",
        "combine_conv|combine_embedding|scale_bias",
        "gram_embedding|gram_hadamard",
        "solve",
    ]


@pytest.mark.parametrize("part", ["first", "second", "third"])
def test_nothing_is_timed_without_the_extension(part, checkout):
    done, stages = run(checkout, part, FAILS="bench.tools.environment|setup.py")
    assert done.returncode == 1
    assert {"extension", "build"} <= {name for name, outcome in stages.items() if outcome == "FAILED"}
    calls = (checkout / "calls").read_text()
    assert "build_ext --inplace" in calls
    assert not re.search(r"bench\.(steps|kernels\.solves|peers|train)", calls)
    # the fused kernels need no extension
    assert ("bench.kernels --tiny --rounds" in calls) == (part == "first")
    assert "the native extension is missing" in done.stdout


def test_sources_that_changed_are_built_anew(checkout):
    (checkout / "build/sources.sha256").write_text(checksum(ROOT / "setup.py", "bench/gpu.sh"))
    done, stages = run(checkout, "gate")
    assert done.returncode == 0
    assert "build" not in stages
    run(checkout, "solves")
    assert "setup.py build_ext --inplace" in (checkout / "calls").read_text()


def test_the_deadline_ends_what_hangs_and_begins_nothing_more(checkout):
    start = time.monotonic()
    done, stages = run(checkout, "first", HANGS="bench.steps", LIMIT="3")
    assert time.monotonic() - start < 40
    assert done.returncode == 1
    assert stages["gate-gram"] == "ok"
    assert stages["steps-resnet"] == "FAILED"
    assert "steps-resnet: FAILED (124)" in done.stdout
    assert stages["solves"] == stages["kernels-gram"] == "left out"
    assert {"ceilings", "gate-gram", "steps-resnet"} <= packed(checkout)


def test_a_signal_leaves_the_archive_and_no_process(checkout):
    hanging = "bench.steps"
    process = subprocess.Popen(**command(checkout, "first", HANGS=hanging), stdout=subprocess.PIPE)
    calls = checkout / "calls"
    while not calls.exists() or hanging not in calls.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert "gate-gram" in packed(checkout)
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"{checkout}/python3 -m {hanging}" not in processes


def test_rows_say_which_commit_was_packed(checkout):
    pack = checkout / "runs/pack"
    pack.mkdir(parents=True)
    (pack / "commit").write_text("0123456789ab\n")
    (pack / "tree.sha256").write_text(checksum(checkout / "bench/gpu.sh", "bench/gpu.sh"))
    python = checkout / "python3"
    python.write_text(python.read_text().replace("exit 0", 'echo "$FNGD_COMMIT $FNGD_DIRTY" >>said'))
    run(checkout, "solves")
    with (checkout / "bench/gpu.sh").open("a") as file:
        file.write("# changed\n")
    run(checkout, "solves")
    said = (checkout / "said").read_text().split("\n")
    assert {line for line in said if line.strip()} == {"0123456789ab 0", "0123456789ab 1"}


@pytest.mark.parametrize("part", ["", "everything"])
def test_the_script_names_its_parts(part, tmp_path):
    done = subprocess.run([ROOT / "bench/gpu.sh", part, tmp_path / "new"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bench/gpu.sh first OUT" in done.stderr
    assert "sanitize  compute-sanitizer" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_the_script_wants_a_gpu(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("DRY", None)
    call = [ROOT / "bench/gpu.sh", "steps", tmp_path / "new"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "AssertionError" in done.stderr
