"""`python -m bench.pinn.demo`: the 2-d Poisson problem by Adam and by GaussNewton, side by side."""

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.peers import PEERS
from bench.peers.base import Setting
from bench.pinn import figures, problems
from bench.pinn.archive import History
from bench.pinn.run import Run, train
from bench.pinn.task import Task
from bench.tools.arguments import positive_float

PROBLEM = "poisson-2d"
# The settings that the comparison of `python -m bench.pinn` chooses for this problem.
CONTENDERS: dict[str, Setting] = {"adam": {"lr": 1e-2}, "gauss-newton": {"damping": 1.0}}
LOG_INTERVAL_S = 5.0


def main(argv: list[str] | None = None) -> int:
    """Train both in turns, showing their errors, and leave the picture; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.pinn.demo", description=__doc__)
    parser.add_argument(
        "--seconds", type=positive_float, default=25.0, help="CPU seconds of each (default: 25)"
    )
    parser.add_argument("--seed", type=int, default=1, help="draws the points and the network (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/pinn-demo.png"), help="picture to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    _compare(options)
    return 0


def _compare(options: argparse.Namespace) -> None:
    problem = problems.load(PROBLEM)
    assert isinstance(problem, problems.Equation)
    tasks = {name: Task.of(problem, options.seed) for name in CONTENDERS}
    running = {
        name: train(Run(PROBLEM, name, setting, options.seed, options.seconds), problem, tasks[name])
        for name, setting in CONTENDERS.items()
    }
    histories: dict[str, History] = {name: [] for name in CONTENDERS}
    count = sum(parameter.numel() for parameter in tasks["adam"].parameters)
    print(
        f"{problem.title}: {' - '.join(map(str, problem.widths))} tanh network, {count} parameters, float64"
    )
    layout = "{percentage:3.0f}%|{bar}| {elapsed} {postfix}"
    with tqdm(
        total=2 * options.seconds, bar_format=layout, dynamic_ncols=True, disable=not sys.stderr.isatty()
    ) as bar:
        logged = time.monotonic()
        while running:
            # Whoever has trained less goes on to its next record.
            name = min(running, key=lambda name: histories[name][-1].seconds if histories[name] else 0.0)
            entry = next(running[name], None)
            if entry is None:
                del running[name]
                continue
            bar.update(entry.seconds - (histories[name][-1].seconds if histories[name] else 0.0))
            histories[name].append(entry)
            bar.set_postfix_str(_standing(histories))
            if bar.disable and time.monotonic() - logged > LOG_INTERVAL_S:
                logged = time.monotonic()
                print(f"  {_standing(histories)}", flush=True)
    print(f"relative L2 error after {options.seconds:g} CPU s of training each: {_standing(histories)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    networks = {name: task.network for name, task in tasks.items()}
    figures.save_side_by_side(options.output, problem.title, problem, networks, histories)
    print(f"picture: {options.output}")


def _standing(histories: dict[str, History]) -> str:
    return ", ".join(
        f"{PEERS[name].label} {history[-1].test_error:.2e} ({history[-1].step} steps)"
        for name, history in histories.items()
        if history
    )


if __name__ == "__main__":
    sys.exit(main())
