"""`python -m bench.pinn`: Gauss-Newton beside Adam, L-BFGS and others on problems with known solutions."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from bench.peers import PINN_NAMES, pinn_of
from bench.pinn import figures, problems, table
from bench.pinn.archive import Archive
from bench.pinn.problems import Equation, Problem
from bench.pinn.study import Final, Study, conduct
from bench.tools.arguments import positive_float, positive_int

# Whose error is drawn over the plane.
DRAWN = ("adam", "adam-lbfgs", "gauss-newton")
SETTINGS = min(len(pinn_of(name).settings) for name in PINN_NAMES)


def parser() -> argparse.ArgumentParser:
    """Return the command line of the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pinn",
        description="Tune every method with equally many settings on validation points, train with the best "
        "over several seeds, every run for the same seconds, and compare the errors at fresh points.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--problem",
        choices=problems.NAMES,
        action="append",
        help="problem, repeatable (default: all; california only with --data-dir)",
    )
    parser.add_argument(
        "--method", choices=PINN_NAMES, action="append", help="method, repeatable (default: all)"
    )
    parser.add_argument("--data-dir", type=Path, help="folder of cal_housing.tgz, for california")
    parser.add_argument(
        "--seconds", type=positive_float, default=30.0, help="CPU seconds of training in each run"
    )
    parser.add_argument(
        "--settings", type=int, default=SETTINGS, help=f"settings each method tries, 1 to {SETTINGS}"
    )
    parser.add_argument(
        "--seed",
        type=int,
        action="append",
        help="seed of a final run, repeatable (default: 1, 2, 3; tuning: 0)",
    )
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/pinn"), help="folder; the runs it holds are not run again"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the comparison that `argv` describes; return the exit status."""
    options = parser().parse_args(argv)
    try:
        _compare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def _compare(options: argparse.Namespace) -> None:
    if not 1 <= options.settings <= SETTINGS:
        raise ValueError(f"settings: expected 1 to {SETTINGS}, got {options.settings}")
    torch.set_num_threads(options.threads)
    study = Study(
        methods=tuple(dict.fromkeys(options.method or PINN_NAMES)),
        settings=options.settings,
        seeds=tuple(dict.fromkeys(options.seed or (1, 2, 3))),
        seconds=options.seconds,
    )
    chosen = [
        problems.load(name, data_dir=options.data_dir) for name in dict.fromkeys(_problem_names(options))
    ]
    archive = Archive(options.output)
    total = study.seconds_per_problem * len(chosen)
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=total, bar_format=layout, dynamic_ncols=True, disable=None) as bar:
        for problem in chosen:
            _show(problem, conduct(study, problem, archive, bar), archive, bar)


def _show(problem: Problem, finals: dict[str, Final], archive: Archive, bar: tqdm) -> None:
    if not finals:
        return
    text = f"{problem.title}\n\n{table.table(problem, finals)}\n"
    (archive.folder / f"{problem.name}.md").write_text(text)
    bar.write(f"\n{text}", file=sys.stdout)
    figures.save_curves(archive.folder / f"{problem.name}.png", problem.title, finals)
    if isinstance(problem, Equation) and len(problem.low) == 2:
        networks = {}
        for name in [name for name in DRAWN if name in finals]:
            networks[name] = problem.network()
            path = archive.network_path(finals[name].runs[0])
            networks[name].load_state_dict(torch.load(path, weights_only=True))
        if networks:
            path = archive.folder / f"{problem.name}-fields.png"
            figures.save_fields(path, problem.title, problem, networks)


def _problem_names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.problem:
        return tuple(options.problem)
    return problems.NAMES if options.data_dir else tuple(n for n in problems.NAMES if n != "california")


if __name__ == "__main__":
    sys.exit(main())
