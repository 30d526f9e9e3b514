"""`python -m bench.train`: train a network by several optimizers, each tuned alike, and compare them."""

import argparse
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch

from bench import workloads
from bench.models import images
from bench.peers import CORE, PEERS, TRAINING_NAMES, available
from bench.tools.arguments import positive_float, positive_int
from bench.train import figures, table
from bench.train.run import PRECISIONS
from bench.train.study import OutOfTime, Study, conduct, describe_point
from bench.workloads import Task

RUNS = Path("runs")
T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    """Return the command line of the training job."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description="Tune every optimizer on the validation split with equally many learning rates, "
        "train with the best of each over several seeds, and compare score, epochs and time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=workloads.NAMES, default="digits", help="data set")
    parser.add_argument("--data-dir", type=Path, help="folder of the archives; digits needs none")
    parser.add_argument("--cache-dir", type=Path, default=RUNS / "cache", help="where decoded data is kept")
    parser.add_argument("--train-size", type=positive_int, help="train on this many samples (default: all)")
    parser.add_argument(
        "--model",
        choices=(*images.NAMES, "transformer"),
        help="network; mlp and cnn have no normalisation (default: mlp, transformer for multi30k)",
    )
    parser.add_argument(
        "--width",
        type=positive_int,
        default=16,
        help="channels of the first stage (mlp, transformer: units / 32)",
    )
    parser.add_argument(
        "--optimizer",
        choices=(*TRAINING_NAMES, "all"),
        action="append",
        help=f"method to train, repeatable (default: {', '.join(CORE)})",
    )
    parser.add_argument("--epochs", type=positive_int, default=15, help="passes over the training split")
    parser.add_argument("--warmup-epochs", type=int, default=0, help="epochs with a rising learning rate")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="samples per step")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=int, action="append", help="seed of a final run, repeatable; the first tunes"
    )
    seeds.add_argument("--seeds", type=positive_int, default=3, help="number of seeds, counted from 0")
    parser.add_argument(
        "--lr",
        type=_rates,
        action="append",
        metavar="[METHOD=]LR,...",
        help="learning rates to try, of one method or of all, repeatable (default: a grid each)",
    )
    parser.add_argument(
        "--share",
        choices=("sample", "position", "mean"),
        default="sample",
        help="what FNGD's coefficients follow",
    )
    parser.add_argument(
        "--damping-factor",
        type=positive_float,
        action="append",
        help="multiple of the recommended damping to try, repeatable, for methods with one (default: 1)",
    )
    parser.add_argument(
        "--label-noise", type=float, default=0.0, help="share of training labels to replace at random"
    )
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="bf16: autocast")
    parser.add_argument("--target", type=float, help="validation accuracy to reach (default: the data set's)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--threads",
        type=positive_int,
        help="CPU threads (default: 1 for digits, whose steps are too short to divide, else torch's choice)",
    )
    parser.add_argument(
        "--shared",
        action="store_true",
        help="other runs share the device: seconds are marked as contaminated, single steps are not timed",
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/DATA[-MODEL]-TIME)")
    parser.add_argument("--rows", type=Path, help="file to append every finished run to, for bench.report")
    parser.add_argument("--seconds", type=positive_float, help="stop after so long; --resume goes on")
    parser.add_argument(
        "--resume", action="store_true", help="go on in --output, or in the newest default folder"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the study that `argv` describes; return the exit status."""
    options = parser().parse_args(argv)
    try:
        _compare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, OutOfTime) as stop:
        print("interrupted: the same command with --resume goes on where this one stopped", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 0
    return 0


def _compare(options: argparse.Namespace) -> None:
    if options.threads is not None or options.data == "digits":
        torch.set_num_threads(options.threads or 1)
    study = _study(options)
    folder = _folder(options)
    task = workloads.load(
        options.data,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        train_size=options.train_size,
        label_noise=options.label_noise,
        device=torch.device(study.device),
    )
    target = task.target if options.target is None else options.target
    _announce(study, task, folder)
    results = conduct(
        study,
        task,
        folder,
        rows=options.rows,
        resume=options.resume,
        seconds=options.seconds,
        shared_device=options.shared,
    )
    rows = table.summarise(results, target=target)
    table.write_json(folder / "results.json", study, task, results, rows, target)
    seeds = ", ".join(map(str, study.seeds))
    title = f"{task.title}, {study.model}, batch {study.batch_size}; mean and range of seeds {seeds}"
    figures.save_curves(folder / "curves.png", results.final, title=title, target=target)
    print(table.table(rows, target=target, metric=task.metric))
    print(f"raw numbers: {folder / 'results.json'}, picture: {folder / 'curves.png'}")


def _study(options: argparse.Namespace) -> Study:
    asked = _unique(options.optimizer or CORE)
    methods, missing = available(tuple(TRAINING_NAMES) if "all" in asked else asked)
    for reason in missing:
        print(f"skipped {reason}")
    if not methods:
        raise ValueError("optimizer: expected one that can run here, got none")
    lrs: dict[str, tuple[float, ...]] = {}
    for method, rates in options.lr or ():
        for name in methods if method is None else [method]:
            lrs[name] = _unique((*lrs.get(name, ()), *rates))
    return Study(
        data=options.data,
        train_size=options.train_size,
        model=options.model or ("transformer" if options.data == "multi30k" else "mlp"),
        width=options.width,
        methods=tuple(methods),
        lrs=lrs,
        damping_factors=_unique(options.damping_factor or (1.0,)),
        seeds=_unique(options.seed) if options.seed else tuple(range(options.seeds)),
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        batch_size=options.batch_size,
        share=options.share,
        label_noise=options.label_noise,
        precision=options.precision,
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
    name = options.data if options.model is None else f"{options.data}-{options.model}"
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


def _announce(study: Study, task: Task, folder: Path) -> None:
    sizes = ", ".join(f"{size} {name}" for name, size in task.sizes.items())
    print(f"{task.title}: {sizes}; {study.model} on {study.device}, {torch.get_num_threads()} threads")
    for method in study.methods:
        points = study.grid(method)
        grid = "; ".join(map(describe_point, points))
        final = f"then {len(study.seeds)} seeds at the best"
        if len(points) == 1:
            final = f"nothing to tune, {len(study.seeds)} seeds"
        print(f"  {PEERS[method].label}: {grid}; {final}")
    print(f"  results in {folder}", flush=True)


def _unique(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _rates(text: str) -> tuple[str | None, tuple[float, ...]]:
    """Return method and rates of `0.1`, `0.1,0.3` or `adamw=0.001,0.003`; no method means all."""
    method, separator, rates = text.rpartition("=")
    if separator and method not in TRAINING_NAMES:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(TRAINING_NAMES)} before =, got {method!r}"
        )
    return method or None, tuple(positive_float(rate) for rate in rates.split(","))


if __name__ == "__main__":
    sys.exit(main())
