"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

BUILD = ROOT / "build/sanitized"
GXX = shutil.which("g++")
SANITIZERS = "address,undefined"


def run(command, timeout, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr[-10_000:]


def runtime_libraries():
    """Return what must be loaded before Python: the sanitizers and what they intercept; skip without them."""
    if sys.platform != "linux" or GXX is None:
        pytest.skip("needs Linux and g++")
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        paths.append(run([GXX, f"-print-file-name={name}"], 30)[1].strip())
        if not Path(paths[-1]).is_absolute():
            pytest.skip(f"the compiler has no {name}")
    return " ".join(paths)


@pytest.fixture(scope="module")
def sanitized():
    """Build the package with sanitizers, and return how to run a Python program with it."""
    libraries = runtime_libraries()
    build = [sys.executable, "setup.py", "-q", "build", "--force"]
    build += ["--build-lib", BUILD / "lib", "--build-temp", BUILD / "temp"]
    status, _, errors = run(build, 600, FNGD_SANITIZE=SANITIZERS, FNGD_NO_CUDA="1", CXX=GXX, CC=GXX)
    assert status == 0, errors

    def run_python(*arguments, timeout=600):
        return run(
            [sys.executable, *arguments],
            timeout,
            LD_PRELOAD=libraries,
            PYTHONPATH=str(BUILD / "lib"),
            # Python itself does not free everything at its end.
            ASAN_OPTIONS="detect_leaks=0",
            UBSAN_OPTIONS="print_stacktrace=1",
        )

    return run_python


def test_operators_and_nodes(sanitized, tally):
    status, output, errors = sanitized("tests/reliability/native_calls.py")
    assert status == 0, errors
    report = json.loads(output)
    assert Path(report["extension"]).is_relative_to(BUILD), "the sanitized build was not what ran"
    assert report["leaked"] == 0
    for name, calls in report["calls"].items():
        tally("Native code", f"{name}, ASan and UBSan", "right, no report, nothing leaked", calls)


@pytest.mark.skipif(GXX is None, reason="needs g++")
@pytest.mark.parametrize("core", ["solve_team", "scale_bias_grid", "finite_grid"])
def test_cuda_cores_as_host_code(tmp_path, full, tally, core):
    runtime_libraries()
    program = tmp_path / core
    build = [
        GXX,
        "-std=c++20",
        "-O1",
        "-g1",
        f"-fsanitize={SANITIZERS}",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    status, _, errors = run([*build, ROOT / f"tests/cpp/{core}.cpp", "-o", program], 300)
    assert status == 0, errors
    # Teams of threads that wait for each other are slow: the quick part makes each step of theirs once.
    quick = ["races"] if core == "solve_team" and not full else []
    status, output, errors = run([program, *quick], 300)
    assert status == 0, output + errors
    tally(
        "Native code",
        f"CUDA kernels as host code ({core}), ASan and UBSan",
        "right, no report, nothing leaked",
    )
