import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import config, fake_run, train_without_waits

from bench import workloads
from bench.models import images
from bench.peers import CORE, PEERS, training_of
from bench.tools.timing import Timing
from bench.train import archive, checkpoint, figures, study, table
from bench.train.__main__ import main
from bench.train.progress import Progress
from bench.train.run import train

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--model", "mlp", "--width", "1", "--train-size", "200", "--epochs", "3", "--batch-size", "32"]


@pytest.fixture(scope="module")
def digits():
    return workloads.load("digits", train_size=200)


@pytest.fixture(autouse=True)
def short_step_timing(monkeypatch):
    monkeypatch.setattr(study, "STEP_ROUNDS", (2, 2))


def without_time(run):
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in run.epochs]


def flatten(value, path=""):
    """Leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {path: value}
    return {key: leaf for name, inner in items for key, leaf in flatten(inner, f"{path}/{name}").items()}


def assert_identical(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        if path.endswith("/seconds") or "/environment/" in path:
            continue
        same = torch.equal(leaf, second[path]) if isinstance(leaf, torch.Tensor) else leaf == second[path]
        assert same, path


class StopAfter:
    """Interrupts the training at a given step, as Ctrl-C does."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


RESUMING = ("sgd", "adamw", "fngd", "fngd-exact", "fngd-adamw", "muon", "soap")


@pytest.mark.parametrize("method", [*CORE, "fngd-adamw", "muon", "soap", "shampoo"])
def test_every_method_learns(method, digits):
    # few steps: the highest rate of those whose steps are of a fixed length
    lr = training_of(method).lrs[4 if method in ("muon", "soap") else 2]
    run = train(config(method, lr=lr, width=2, epochs=8), digits, read_test=True)
    assert len(run.epochs) == 8
    assert run.epochs[-1]["train_loss"] < 0.5 * run.epochs[0]["train_loss"]
    assert run.epochs[-1]["validation_accuracy"] > 0.7
    assert run.test_score > 70
    assert run.validation_score == 100 * run.epochs[-1]["validation_accuracy"]
    assert all(epoch["seconds"] > 0 for epoch in run.epochs)


@pytest.mark.parametrize(
    ("method", "share"),
    [*((method, "sample") for method in RESUMING), ("fngd", "position"), ("fngd", "mean")],
)
def test_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(method, share, digits, tmp_path):
    # 7 steps an epoch: the interruption falls into the middle of the third epoch
    settings = config(method, epochs=4, share=share)
    whole, resumed = tmp_path / "whole.pt", tmp_path / "resumed.pt"
    expected = train(settings, digits, read_test=True, checkpoint_path=whole)
    with pytest.raises(KeyboardInterrupt):
        train(settings, digits, checkpoint_path=resumed, on_step=StopAfter(17))
    assert len(checkpoint.load(resumed)["epochs"]) == 2
    torch.rand(5)
    run = train(settings, digits, read_test=True, checkpoint_path=resumed)
    assert without_time(run) == without_time(expected)
    assert run.test_score == expected.test_score
    assert_identical(checkpoint.load(resumed), checkpoint.load(whole))


def test_interrupted_convolutional_run_with_augmentation(tmp_path, digits):
    cropped = workloads.Workload(**{**vars(digits), "crop_padding": 1})
    settings = config(model="resnet18", epochs=2, batch_size=100)
    expected = train(settings, cropped, checkpoint_path=tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(settings, cropped, checkpoint_path=tmp_path / "resumed.pt", on_step=StopAfter(3))
    run = train(settings, cropped, checkpoint_path=tmp_path / "resumed.pt")
    assert without_time(run) == without_time(expected)
    assert without_time(train(settings, digits)) != without_time(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [*CORE, "fngd-adamw"])
def test_no_step_on_images_waits_for_the_device(method, precision, digits):
    cropped = workloads.Workload(**{**vars(digits), "crop_padding": 1}).to(torch.device("cuda"))
    settings = config(
        method, model="resnet18", width=4, epochs=2, batch_size=25, precision=precision, device="cuda"
    )
    train_without_waits(settings, cropped)


def test_run_that_shared_the_device_for_a_part_says_so(digits, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(config(), digits, shared_device=True, checkpoint_path=path, on_step=StopAfter(8))
    assert train(config(), digits, checkpoint_path=path).shared_device
    assert train(config(), digits, shared_device=True).shared_device
    assert not train(config(), digits).shared_device


def test_checkpoint_of_another_configuration_is_refused(digits, tmp_path):
    train(config(epochs=1), digits, checkpoint_path=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"checkpoint: expected one of .*epochs=2.*, got .*'epochs': 1"):
        train(config(epochs=2), digits, checkpoint_path=tmp_path / "run.pt")


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"epoch": 1})

    def torn_save(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn_save)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1}


def test_diverged_run_is_recorded_without_nan(digits, tmp_path):
    run = train(config(lr=1e20), digits, read_test=True)
    assert run.diverged
    assert run.test_score is None
    assert all(math.isfinite(value) for epoch in run.epochs for value in epoch.values())
    archive.save_run(tmp_path / "run.json", run)
    assert archive.load_run(tmp_path / "run.json") == run
    assert "diverged in epoch" in study.describe("run", run)


def test_test_split_is_read_once_a_final_run(digits, tmp_path, monkeypatch):
    read = []
    evaluate = workloads.Workload.evaluate

    def watched(workload, model, split):
        read.append(split is workload.test)
        return evaluate(workload, model, split)

    monkeypatch.setattr(workloads.Workload, "evaluate", watched)
    train(config(), digits)
    assert sum(read) == 0
    train(config(), digits, read_test=True)
    assert sum(read) == 1


def test_choice_is_the_last_validation_accuracy_then_the_loss():
    runs = [
        fake_run("sgd", 0.1, [0.99, 0.8]),
        fake_run("sgd", 0.2, [0.5, 0.9], losses=[1, 0.4]),
        fake_run("sgd", 0.3, [0.5, 0.9], losses=[1, 0.3]),
        fake_run("sgd", 0.4, [0.95], diverged=True),
    ]
    assert study.choose(runs) == (0.3, None)


def test_method_that_diverges_everywhere_is_left_out(tmp_path, capsys):
    arguments = ["--optimizer", "sgd", "--optimizer", "adamw", "--seeds", "1"]
    assert cli(tmp_path, *arguments, "--lr", "sgd=1e20,1e21", "--lr", "adamw=0.01") == 0
    out, err = capsys.readouterr()
    assert "SGD: diverged at all it tried" in err
    assert "AdamW" in out
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["table"]] == [
        "adamw"
    ]


@pytest.mark.parametrize("lr", ["1e20", "1e20,1e21"])
def test_study_in_which_every_method_diverges_is_an_error(tmp_path, capsys, lr):
    assert cli(tmp_path, "--optimizer", "sgd", "--seeds", "1", "--lr", lr) == 2
    assert "every method diverged" in capsys.readouterr().err


def test_method_with_a_single_setting_is_not_tuned(tmp_path, capsys):
    arguments = ["--optimizer", "sgd", "--optimizer", "adamw", "--seeds", "2"]
    assert cli(tmp_path, *arguments, "--lr", "sgd=0.03", "--lr", "adamw=0.003,0.01") == 0
    out, err = capsys.readouterr()
    assert "SGD: lr 0.03; nothing to tune, 2 seeds" in out
    assert "AdamW: lr 0.003; lr 0.01; then 2 seeds at the best" in out
    assert "chosen on validation: SGD" not in err
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {method: len(runs) for method, runs in stored["tuning"].items()} == {"sgd": 0, "adamw": 2}
    assert {method: len(runs) for method, runs in stored["final"].items()} == {"sgd": 2, "adamw": 2}
    assert stored["chosen"]["sgd"] == [0.03, None]
    assert not stored["table"][0]["at_edge"]


def test_single_setting_that_diverges_is_listed(tmp_path, capsys):
    arguments = ["--optimizer", "sgd", "--optimizer", "adamw", "--seeds", "1"]
    assert cli(tmp_path, *arguments, "--lr", "sgd=1e20", "--lr", "adamw=0.01") == 0
    assert "SGD (1 of 1 diverged)" in capsys.readouterr().out


def test_rows_from_known_runs():
    final = {
        "sgd": [
            fake_run("sgd", 0.1, [0.5, 0.9, 0.8], test=0.7, seconds=[2, 1, 3]),
            fake_run("sgd", 0.1, [0.95, 0.9, 0.9], test=0.8, seconds=[2, 2, 2]),
        ],
        "fngd": [
            fake_run("fngd", 0.03, [0.6, 0.7, 0.8], test=0.9, seconds=[9, 2, 4]),
            fake_run("fngd", 0.03, [0.6], diverged=True),
        ],
        "fngd-exact": [fake_run("fngd-exact", 0.1, [0.9], test=0.9, seconds=[7])],
    }
    results = study.Results(
        tuning={
            "sgd": [fake_run("sgd", lr, [0.5]) for lr in (0.3, 0.1, 0.03)],
            "fngd": [fake_run("fngd", lr, [0.5]) for lr in (0.3, 0.1, 0.03)],
            "fngd-exact": [fake_run("fngd-exact", 0.1, [0.5])],
        },
        chosen={"sgd": (0.1, None), "fngd": (0.03, 0.1), "fngd-exact": (0.1, 0.1)},
        final=final,
        steps={
            "sgd": Timing((2.0, 2.0)),
            "fngd": Timing((2.0, 2.2)),
            "fngd solving": Timing((4.0, 5.0)),
            "fngd-exact solving": Timing((5.0, 5.0)),
        },
    )
    sgd, shared, exact = table.summarise(results, target=0.9)
    assert sgd.validation_score.mean == pytest.approx(85)
    assert sgd.validation_score.std == pytest.approx(statistics.stdev([80, 90]))
    assert sgd.test_score.mean == pytest.approx(75)
    assert sgd.seconds_to_target.mean == pytest.approx((3 + 2) / 2)
    assert (sgd.epochs_to_target.mean, sgd.reached_target, sgd.at_edge) == (1.5, 2, False)
    assert (sgd.solving_epoch_seconds, sgd.later_epoch_seconds) == (None, 2)
    assert (sgd.solving_step_over_sgd, sgd.later_step_over_sgd) == (None, 1.0)
    assert (shared.diverged, shared.reached_target, shared.epochs_to_target) == (1, 0, None)
    assert (shared.test_score.std, shared.at_edge) == (None, True)
    assert (shared.solving_epoch_seconds, shared.later_epoch_seconds) == (9, 3)
    assert shared.solving_step_over_sgd == pytest.approx(2.25)
    assert shared.later_step_over_sgd == pytest.approx(1.05)
    assert (exact.solving_epoch_seconds, exact.later_epoch_seconds, exact.at_edge) == (7, None, False)
    text = table.table([sgd, shared, exact], target=0.9, metric="accuracy")
    assert "85.00 ± 7.07" in text
    assert "1 of 2 diverged" in text
    assert "0.03*" in text
    assert "(0 of 2 seeds)" in text


def test_seconds_on_a_shared_device_are_left_out(tmp_path, monkeypatch):
    final = {
        "sgd": [
            fake_run("sgd", 0.1, [0.5, 0.9], seconds=[1, 2]),
            fake_run("sgd", 0.1, [0.9, 0.9], seconds=[100, 200], shared=True),
        ],
        "adamw": [fake_run("adamw", 0.01, [0.9, 0.9], seconds=[100, 200], shared=True)],
    }
    chosen = {"sgd": (0.1, None), "adamw": (0.01, None)}
    results = study.Results({"sgd": [], "adamw": []}, chosen, final, steps={})
    sgd, adamw = rows = table.summarise(results, target=0.9)
    assert (sgd.epochs_to_target.mean, sgd.seconds_to_target.mean, sgd.later_epoch_seconds) == (1.5, 3, 1.5)
    assert (adamw.epochs_to_target.mean, adamw.seconds_to_target, adamw.later_epoch_seconds) == (
        1,
        None,
        None,
    )
    text = table.table(rows, target=0.9, metric="accuracy")
    assert text.endswith("shared the device with others: SGD 1 of 2, AdamW 1 of 1")
    assert "shared" not in table.table(
        table.summarise(replace(results, final={"sgd": final["sgd"][:1]}), target=0.9),
        target=0.9,
        metric="accuracy",
    )

    drawn = []
    monkeypatch.setattr(figures, "_band", lambda axis, x, values, *_: drawn.append((x.tolist(), len(values))))
    figures.save_curves(tmp_path / "curves.png", final, title="", target=0.9)
    # two rows each: both methods over epochs, one run over seconds
    assert drawn == [([1, 2], 2)] * 2 + [([1, 2], 1)] * 2 + [([1, 3], 1)] * 2
    drawn.clear()
    figures.save_curves(tmp_path / "curves.png", {"adamw": final["adamw"]}, title="", target=0.9)
    assert drawn == [([1, 2], 1)] * 2


def cli(folder, *arguments):
    return main([*SMALL, "--output", str(folder), *arguments])


def test_command_line_from_tuning_to_picture(tmp_path, capsys, monkeypatch):
    grid = ["--lr", "0.01", "--lr", "0.03", "--seed", "4", "--seed", "7"]
    assert cli(tmp_path, *grid) == 0
    out, err = capsys.readouterr()
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["study"]["methods"] == list(CORE)
    assert stored["task"]["title"] == "digits"
    assert stored["task"]["sizes"] == {"train": 200, "validation": 360, "test": 360}
    assert {"commit", "torch", "cpu", "threads", "date", "gpu"} <= stored["environment"].keys()
    for row in stored["table"]:
        method = row["method"]
        assert PEERS[method].label in out
        tuned = [run["epochs"][-1]["validation_accuracy"] for run in stored["tuning"][method]]
        assert len(tuned) == 2
        best = next(run for run in stored["tuning"][method] if run["config"]["lr"] == row["lr"])
        assert best["epochs"][-1]["validation_accuracy"] == max(tuned)
        assert all(run["test_score"] is None for run in stored["tuning"][method])
        assert [run["config"]["seed"] for run in stored["final"][method]] == [4, 7]
        assert not any(run["environment"]["shared_device"] for run in stored["final"][method])
        tests = [run["test_score"] for run in stored["final"][method]]
        assert row["test_score"]["mean"] == pytest.approx(statistics.mean(tests))
        assert f"{statistics.mean(tests):.2f} ± {statistics.stdev(tests):.2f}" in out
    assert set(stored["steps"]) == {"sgd", "adamw", "fngd", "fngd solving", "fngd-exact solving"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "final-fngd-exact-lr" in err
    assert not list(tmp_path.glob("runs/*.pt"))

    def train_again(*_, **__):
        raise AssertionError("a finished run was run again")

    assert cli(tmp_path, *grid) == 2
    assert "holds runs already" in capsys.readouterr().err
    monkeypatch.setattr(study, "train", train_again)
    assert cli(tmp_path, *grid, "--resume") == 0
    assert json.loads((tmp_path / "results.json").read_text())["final"] == stored["final"]
    assert cli(tmp_path, *grid, "--resume", "--share", "mean") == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_study_on_a_shared_device_times_nothing(tmp_path, capsys, monkeypatch):
    def timed(*_):
        raise AssertionError("steps were timed")

    monkeypatch.setattr(study, "time_steps", timed)
    assert cli(tmp_path, "--optimizer", "sgd", "--lr", "0.03,0.1", "--seeds", "1", "--shared") == 0
    out, err = capsys.readouterr()
    assert "without the seconds of runs that shared the device with others: SGD 1 of 1" in out
    assert "s / epoch" not in out
    assert "s of training on a shared device" in err
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["steps"] == {}
    kept = [run["environment"] for stage in ("tuning", "final") for run in stored[stage]["sgd"]]
    assert [environment["shared_device"] for environment in kept] == [True] * 3
    assert all(environment["torch"] == torch.__version__ for environment in kept)


@pytest.mark.parametrize("share", ["sample", "position", "mean"])
def test_timed_steps_are_of_the_phase_they_are_named_after(share, digits, monkeypatch):
    optimizers = []
    fngd = training_of("fngd")

    def build(model, settings):
        optimizers.append(fngd.build(model, settings))
        return optimizers[-1]

    monkeypatch.setitem(PEERS, "fngd", replace(PEERS["fngd"], training=replace(fngd, build=build)))
    common = {key: value for key, value in vars(config()).items() if key in study.SHARED}
    asked = study.Study(
        **(common | {"share": share}), methods=("fngd",), lrs={}, damping_factors=(1.0,), seeds=(0,)
    )
    timings = study.time_steps(asked, digits)
    assert list(timings) == ["sgd", "fngd", "fngd solving"]
    later, solving = optimizers
    assert later.stats()["solved_batches"] == 1
    # 1 trial round and 5 of warm-up, then the 2 timed
    assert solving.stats()["solved_batches"] == 8


def test_interrupted_command_tells_how_to_go_on(tmp_path, capsys, monkeypatch):
    grid = ["--optimizer", "sgd", "--lr", "0.01", "--seeds", "1"]
    monkeypatch.setattr(Progress, "advance", lambda *_: StopAfter(1)())
    assert cli(tmp_path, *grid) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli(tmp_path, *grid, "--resume") == 0


def test_killed_command_resumes_to_the_same_numbers(tmp_path):
    arguments = ["--optimizer", "fngd", "--lr", "0.03", "--epochs", "60", "--seeds", "1"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "bench.train", *SMALL, *arguments, "--output", str(tmp_path / "killed")],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("runs/*.pt")):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    assert cli(tmp_path / "killed", *arguments, "--resume") == 0
    assert cli(tmp_path / "whole", *arguments) == 0
    first, second = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    for stage in ("tuning", "final"):
        assert_identical(second[stage], first[stage])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10"], "data_dir: cifar10 needs the folder that holds its archive"),
        (["--data", "cifar100", "--data-dir", "/nonexistent"], "data_dir: expected a folder"),
        (["--train-size", "3"], "train_size: expected 10 to 1067 images, got 3"),
        (["--device", "warp"], "device: expected auto, cpu or cuda, got 'warp'"),
        pytest.param(
            ["--device", "cuda"],
            "device: torch sees no GPU on this machine",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    assert cli(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", [["--lr", "-1"], ["--epochs", "0"], ["--optimizer", "lion"], ["--lr", "lion=0.1"]]
)
def test_bad_values_are_refused_by_the_parser(tmp_path, capsys, argument):
    with pytest.raises(SystemExit):
        cli(tmp_path, *argument)
    assert argument[0] in capsys.readouterr().err


def test_resume_without_a_folder_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--resume"]) == 2
    assert "resume: expected a folder runs/digits-mlp-TIME, found none" in capsys.readouterr().err


def test_progress_writes_plain_lines_to_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr("bench.train.progress.LOG_INTERVAL_S", 0.0)
    with Progress(4) as progress:
        progress.doing("warm")
        progress.advance(2)
        progress.note("halfway")
    assert log.getvalue() == "  warm: 2 of 4 steps (50%) after 0 s\nhalfway\n"


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (1, 8, 8)), ("cnn", (3, 9, 10)), ("resnet18", (3, 32, 32))]
)
def test_models(name, shape):
    model = images.build(name, shape, 7, width=4)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"model: expected one of mlp, cnn, resnet18, got 'vit'"):
        images.build("vit", (1, 8, 8), 7, width=4)
    with pytest.raises(ValueError, match="width: expected 1 or more, got 0"):
        images.build("mlp", (1, 8, 8), 7, width=0)
