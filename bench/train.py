"""`python -m bench.train`: train a network by SGD, AdamW and FNGD, each tuned alike, and compare them."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch

from bench import figures, models, report, workloads
from bench.optimizers import METHODS
from bench.study import Study, conduct
from bench.workloads import Workload

RUNS = Path("runs")
T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    """Command line of the training job."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description="Tune every optimizer on the validation split with equally many learning rates, "
        "train with the best rate of each over several seeds, and compare accuracy, epochs and time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=workloads.NAMES, default="digits", help="data set")
    parser.add_argument("--data-dir", type=Path, help="folder of the CIFAR archive; digits needs none")
    parser.add_argument(
        "--cache-dir", type=Path, default=RUNS / "cache", help="where decoded images are kept"
    )
    parser.add_argument("--train-size", type=_positive, help="train on this many images (default: all)")
    parser.add_argument(
        "--model", choices=models.NAMES, default="mlp", help="network; mlp and cnn have no normalisation"
    )
    parser.add_argument(
        "--width", type=_positive, default=16, help="channels of the first stage (mlp: units / 32)"
    )
    parser.add_argument(
        "--optimizer",
        choices=tuple(METHODS),
        action="append",
        help="method to train, repeatable (default: all four)",
    )
    parser.add_argument("--epochs", type=_positive, default=15, help="passes over the training split")
    parser.add_argument("--batch-size", type=_positive, default=64, help="images per step")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=int, action="append", help="seed of a final run, repeatable; the first tunes"
    )
    seeds.add_argument("--seeds", type=_positive, default=3, help="number of seeds, counted from 0")
    parser.add_argument(
        "--lr",
        type=_positive_float,
        action="append",
        help="learning rate to try, repeatable (default: a grid each)",
    )
    parser.add_argument(
        "--share",
        choices=("sample", "position", "mean"),
        default="sample",
        help="what FNGD's coefficients follow",
    )
    parser.add_argument(
        "--damping", type=_positive_float, default=0.1, help="FNGD's damping, relative to tr(K)/N"
    )
    parser.add_argument("--target", type=float, help="validation accuracy to reach (default: the data set's)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--threads",
        type=_positive,
        help="CPU threads (default: 1 for digits, whose steps are too short to divide, else torch's choice)",
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/DATA-MODEL-TIME)")
    parser.add_argument(
        "--resume", action="store_true", help="go on in --output, or in the newest default folder"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the study that `arguments` describe; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        _compare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def _compare(options: argparse.Namespace) -> None:
    if options.threads is not None or options.data == "digits":
        torch.set_num_threads(options.threads or 1)
    study = _study(options)
    folder = _folder(options)
    workload = workloads.load(
        options.data, data_dir=options.data_dir, cache_dir=options.cache_dir, train_size=options.train_size
    ).to(torch.device(study.device))
    target = workload.target if options.target is None else options.target
    _announce(study, workload, folder)
    results = conduct(study, workload, folder)
    rows = report.summarise(results, target=target)
    report.write_json(folder / "results.json", study, workload, results, rows, target)
    seeds = ", ".join(map(str, study.seeds))
    title = f"{workload.title}, {study.model}, batch {study.batch_size}; mean and range of seeds {seeds}"
    figures.save_curves(folder / "curves.png", results, title=title, target=target)
    print(report.table(rows, target=target))
    print(f"raw numbers: {folder / 'results.json'}, picture: {folder / 'curves.png'}")


def _study(options: argparse.Namespace) -> Study:
    return Study(
        data=options.data,
        train_size=options.train_size,
        model=options.model,
        width=options.width,
        methods=_unique(options.optimizer or METHODS),
        lrs=_unique(options.lr) if options.lr else None,
        seeds=_unique(options.seed) if options.seed else tuple(range(options.seeds)),
        epochs=options.epochs,
        batch_size=options.batch_size,
        share=options.share,
        damping=options.damping,
        device=_device(options.device),
    )


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no GPU on this machine; use cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _folder(options: argparse.Namespace) -> Path:
    name = f"{options.data}-{options.model}"
    if options.output is not None:
        if (options.output / "runs").exists() and not options.resume:
            raise ValueError(
                f"output: {options.output} holds runs already; add --resume or choose another folder"
            )
        return options.output
    if options.resume:
        found = sorted(RUNS.glob(f"{name}-[0-9]*"))
        if not found:
            raise ValueError(
                f"resume: expected a folder {RUNS}/{name}-TIME, found none; choose one by --output"
            )
        return found[-1]
    return RUNS / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _announce(study: Study, workload: Workload, folder: Path) -> None:
    splits = {"training": workload.train, "validation": workload.validation, "test": workload.test}
    sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    print(f"{workload.title}: {sizes}; {study.model} on {study.device}, {torch.get_num_threads()} threads")
    for method in study.methods:
        rates = ", ".join(f"{lr:g}" for lr in study.grid(method))
        print(f"  {METHODS[method].label}: learning rates {rates}; then {len(study.seeds)} seeds at the best")
    print(f"  results in {folder}", flush=True)


def _unique(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
