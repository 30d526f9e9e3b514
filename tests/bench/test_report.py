import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from image_archives import jpeg_files, write_tar
from training_runs import config, fake_run

from bench import workloads
from bench.report import __main__ as report
from bench.report import training
from bench.tools import environment, jsonl
from bench.train import study
from bench.train.__main__ import main as train_main
from bench.train.run import lr_factor, train

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "bench" / "gpu_study.sh"
HERE = environment.describe(torch.device("cpu")) | {"commit": "abc123", "load": 0.5}
TASK = {"title": "digits", "metric": "accuracy", "target": 0.9, "sizes": {"train": 3, "validation": 2}}


def training_row(run, stage, **changes):
    run.config = replace(run.config, **changes)
    run.environment = HERE | run.environment
    return {"stage": stage, "task": TASK, **asdict(run)}


def step_rows(network, seconds, peak=2**20, date="2026-01-02T00:00:00"):
    return [
        {
            "network": network,
            "contender": name,
            "ratio": value / seconds["sgd"],
            "median_s": value,
            "p20_s": value,
            "p80_s": value,
            "peak_bytes": peak,
            "extra_bytes": 0,
            **HERE,
            "date": date,
        }
        for name, value in seconds.items()
    ]


def page(folder, capsys):
    assert report.main(["--results", str(folder)]) == 0
    capsys.readouterr()
    return (folder / "REPORT.md").read_text()


def test_page_of_known_rows(tmp_path, capsys):
    jsonl.append(
        tmp_path / "training.jsonl",
        [
            training_row(fake_run("sgd", 0.1, [0.5, 0.8]), "tune"),
            training_row(fake_run("sgd", 0.3, [0.5, 0.9]), "tune"),
            training_row(fake_run("sgd", 1.0, [0.5], diverged=True), "tune"),
            training_row(fake_run("sgd", 0.3, [0.5, 0.92], test=0.875, seconds=[2, 3]), "final"),
            training_row(fake_run("adamw", 0.01, [0.5, 0.7]), "tune"),
            training_row(fake_run("adamw", 0.01, [0.5, 0.71], test=0.625), "final"),
        ],
    )
    seconds = {"sgd": 0.010, "fngd": 0.011, "fngd solving": 0.02, "fngd average": 0.0125, "kfac": 0.03}
    jsonl.append(tmp_path / "peers.jsonl", step_rows("Old", {"sgd": 1.0}, date="2025-01-01"))
    jsonl.append(tmp_path / "peers.jsonl", step_rows("Net", {"sgd": 7.0}, date="2025-01-01"))
    # K-FAC in a process of its own, of which the next one times SGD again
    jsonl.append(tmp_path / "peers.jsonl", step_rows("Net", {"sgd": 0.01, "muon": 0.019}, date="2026-01-01"))
    jsonl.append(tmp_path / "peers.jsonl", step_rows("Net", seconds))
    text = page(tmp_path, capsys)
    assert "K-FAC over FNGD average: 2.40 (in the paper: 2.4)" in text
    assert "| SGD " in text
    assert "7000.00" not in text
    assert text.index("1.90 | 19.00") < text.index("3.00 | 30.00")
    assert "87.50" in text
    assert "62.50" in text
    assert "5.0" in text
    tuning = text[text.index("by learning rate") :].splitlines()
    header = [cell.strip() for cell in tuning[2].split("|")[1:-1]]
    sgd = [cell.strip() for cell in tuning[4].split("|")[1:-1]]
    assert dict(zip(header, sgd, strict=True)) == {
        "method": "SGD",
        "0.01": "",
        "0.1": "80.00",
        "0.3": "90.00",
        "1": "diverged",
    }
    assert "Commit abc123" in text
    assert "load average 0.5 to 0.5" in text
    assert "steps of ResNet-18 on a GPU" in text
    for picture in ("steps-1.png", "steps-2.png", "training-1.png"):
        assert f"(pictures/{picture})" in text
        assert (tmp_path / "pictures" / picture).read_bytes().startswith(b"\x89PNG")


def test_page_of_methods_that_were_not_tuned(tmp_path, capsys):
    final = training_row(fake_run("sgd", 0.3, [0.5, 0.92], test=0.875, seconds=[2, 3]), "final")
    jsonl.append(tmp_path / "training.jsonl", [final])
    text = page(tmp_path, capsys)
    assert "87.50" in text
    assert "by learning rate" not in text
    assert "Not tuned, with a single setting to try: SGD." in text
    jsonl.append(
        tmp_path / "training.jsonl",
        [
            training_row(fake_run("adamw", lr, [0.5, 0.7]), stage)
            for lr, stage in ((0.1, "tune"), (0.1, "final"))
        ],
    )
    text = page(tmp_path, capsys)
    assert "by learning rate" in text
    assert "Not tuned, with a single setting to try: SGD." in text


def test_page_of_runs_on_a_shared_device(tmp_path, capsys):
    run = fake_run("sgd", 0.3, [0.5, 0.92], test=0.875, seconds=[2, 3], shared=True)
    jsonl.append(tmp_path / "training.jsonl", [training_row(run, "final")])
    text = page(tmp_path, capsys)
    assert "without the seconds of runs that shared the device with others: SGD 1 of 1" in text
    assert " s to 90.0%" not in text
    assert "s / epoch" not in text


def test_processes_append_whole_calls_at_a_time(tmp_path):
    program = """if True:
        import sys
        from pathlib import Path
        from bench.tools import jsonl
        name, path = sys.argv[1:]
        sys.stdin.readline()
        for call in range(20):
            jsonl.append(Path(path), 2 * [{"name": name, "call": call, "text": name * 100_000}])
    """
    path = tmp_path / "rows.jsonl"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, name, path], cwd=REPOSITORY, stdin=subprocess.PIPE, text=True
        )
        for name in "abcd"
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[::2] == rows[1::2]
    assert all(row["text"] == row["name"] * 100_000 for row in rows)
    assert sorted((row["name"], row["call"]) for row in rows[::2]) == [
        (name, call) for name in "abcd" for call in range(20)
    ]


def test_studies_are_told_apart_by_what_their_runs_have_in_common():
    rows = [
        training_row(fake_run("sgd", lr, [0.5]), "tune", label_noise=noise, seed=seed)
        for lr in (0.1, 0.3)
        for noise in (0.0, 0.2)
        for seed in (0, 1)
    ]
    again = training_row(fake_run("sgd", 0.1, [0.75]), "tune", label_noise=0.2)
    found = training.studies([*rows, again])
    assert [s.config.label_noise for s in found] == [0.0, 0.2]
    assert [len(s.tuning["sgd"]) for s in found] == [4, 4]
    assert 75 in [run.validation_score for run in found[1].tuning["sgd"]]


def test_page_without_results_lists_all_as_not_measured(tmp_path, capsys):
    text = page(tmp_path, capsys)
    assert "steps of Transformer on a GPU" in text
    assert "training on cifar100 on a GPU" in text
    assert "## Training" not in text


def test_label_noise_replaces_the_share_asked_for_by_other_classes():
    clean, noisy = workloads.load("digits"), workloads.load("digits", label_noise=0.4)
    changed = clean.train.y != noisy.train.y
    assert torch.equal(changed, noisy.replaced)
    assert changed.sum().item() == round(0.4 * len(clean.train))
    assert torch.equal(clean.train.x, noisy.train.x)
    assert torch.equal(clean.validation.y, noisy.validation.y)
    assert torch.equal(clean.test.y, noisy.test.y)
    assert torch.equal(noisy.train.y, workloads.load("digits", label_noise=0.4).train.y)
    # every other class is as likely as any: 431 draws over 9 shifts
    shifts = torch.bincount((noisy.train.y - clean.train.y)[changed] % 10, minlength=10)
    assert shifts[0] == 0
    assert shifts[1:].min() > 431 / 9 / 2
    with pytest.raises(ValueError, match=r"label_noise: expected 0 or more and below 1, got 1\.0"):
        workloads.load("digits", label_noise=1.0)


def test_coefficients_are_told_apart_by_label(monkeypatch):
    noisy = workloads.load("digits", train_size=200, label_noise=0.25)
    tables = []
    quantile = torch.Tensor.quantile
    monkeypatch.setattr(torch.Tensor, "quantile", lambda x, q: tables.append(x) or quantile(x, q))
    run = train(config("fngd"), noisy)
    kept, replaced = tables
    assert (len(kept), len(replaced)) == (150, 50)
    assert run.coefficients["kept"][0] == kept.min().item()
    assert run.coefficients["replaced"][-1] == replaced.max().item()
    # each batch's weights have mean 1 in every layer
    assert torch.cat([kept, replaced]).mean().item() == pytest.approx(1, abs=1e-4)
    assert train(config("sgd"), noisy).coefficients is None
    assert train(config("fngd-exact"), noisy).coefficients is None


def test_rate_rises_then_falls():
    rates = [lr_factor(step, 10, 4) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert lr_factor(5, 10, 0) == pytest.approx(0.5)


def test_bf16_run_differs_from_fp32_and_learns():
    digits = workloads.load("digits", train_size=200)
    half, full = (train(config("fngd", epochs=6, precision=p, width=2), digits) for p in ("bf16", "fp32"))
    assert half.validation_score > 60
    assert half.epochs[-1]["train_loss"] != full.epochs[-1]["train_loss"]


def test_damping_factors_multiply_what_each_method_recommends():
    common = {key: value for key, value in vars(config()).items() if key in study.SHARED}
    asked = study.Study(
        **common,
        methods=("sgd", "fngd", "kfac"),
        lrs={"fngd": (0.2,)},
        damping_factors=(0.1, 1.0),
        seeds=(0,),
    )
    assert asked.grid("fngd") == [(0.2, pytest.approx(0.01)), (0.2, 0.1)]
    assert [damping for _, damping in asked.grid("sgd")] == [None] * 5
    dampings = sorted({damping for _, damping in asked.grid("kfac")})
    assert dampings == pytest.approx([0.0003, 0.003])


def test_rows_and_tensorboard_of_a_study(tmp_path, capsys):
    arguments = ["--width", "1", "--train-size", "100", "--epochs", "2", "--seeds", "1", "--optimizer", "sgd"]
    rows = tmp_path / "rows.jsonl"
    arguments += ["--lr", "0.1,0.3"]
    assert train_main([*arguments, "--output", str(tmp_path / "s"), "--rows", str(rows)]) == 0
    stored = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["stage"] for row in stored] == ["tune", "tune", "final"]
    assert stored[2]["task"]["title"] == "digits"
    assert stored[2]["environment"]["torch"] == torch.__version__
    assert len(list((tmp_path / "s" / "tensorboard").glob("*/events.*"))) == 3


def test_study_out_of_time_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--width", "1", "--train-size", "100", "--epochs", "2", "--seeds", "1", "--optimizer", "sgd"]
    arguments += ["--lr", "0.1,0.3", "--output", str(tmp_path / "s"), "--rows", str(tmp_path / "rows.jsonl")]
    assert train_main([*arguments, "--seconds", "1e-9"]) == 0
    assert "--resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
    assert train_main([*arguments, "--resume"]) == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 3
    # elsewhere, with the rows alone
    arguments[arguments.index("--output") + 1] = str(tmp_path / "elsewhere")
    assert train_main([*arguments, "--resume"]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == rows
    assert train_main([*arguments, "--resume", "--batch-size", "32"]) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6


def script(part, folder, **settings):
    settings = {"DEVICE": "cpu", "SIZE": "small", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(
        ["bash", SCRIPT, part, folder], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )


def test_gpu_study_in_miniature(tmp_path):
    write_tar(tmp_path / "cifar10-jpeg.tar.gz", jpeg_files())
    results = tmp_path / "results"
    # out of time at once: neither study gets beyond its first step, and neither is an error
    done = script("noise", results, DATA_DIR=str(tmp_path), SECONDS_A_PART="1")
    assert done.returncode == 0, done.stderr
    assert "FNGD exact" in done.stdout
    assert "no time left for cifar10-noise-0.4: call again" in done.stdout
    done = script("report", results)
    assert done.returncode == 0, done.stderr
    assert (results / "REPORT.md").exists()


def test_gpu_study_without_a_part_says_how(tmp_path):
    done = script("", tmp_path)
    assert done.returncode == 2
    assert "steps|cifar|translation|noise|report" in done.stderr
