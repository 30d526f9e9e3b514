"""Time a step of every optimizer over SGD's: `python -m bench.peers --device cuda --size gpu`."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from bench.peers import TRAINING_NAMES, available, training_of
from bench.peers.cycles import BASELINE, cycle_makers, cycle_rows, measure, turn_length
from bench.steps import gate, networks
from bench.steps.networks import Network
from bench.tools import arguments, environment, jsonl
from bench.tools.attempt import attempt
from bench.tools.timing import Step

# Every method once: a step of FNGD exact is the solving step of FNGD shared.
DEFAULT = tuple(name for name in TRAINING_NAMES if training_of(name).solves != "always")
NETWORKS: dict[str, dict[str, Network]] = {
    "tiny": {name: sizes["small"] for name, sizes in networks.MIXED.items()},
    "small": {"resnet": networks.RESNET, "transformer": networks.TRANSFORMER},
    "gpu": {name: sizes["gpu"] for name, sizes in networks.MIXED.items()},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Append the rows of each network as they come; return how many contenders failed."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    names, absent = available(tuple(dict.fromkeys((BASELINE, *(options.method or DEFAULT)))))
    for reason in absent:
        print(f"skipped {reason}")
    where = environment.describe(device)
    failed = 0
    for key in options.network or ("resnet", "transformer"):
        network = NETWORKS[options.size][key]
        batch = network.draw(device)
        # No figure without its gate; the other network still gets its own.
        if not attempt(f"{network.name}, gate", partial(gate.check, network, batch)):
            failed += 1
            continue
        print(f"{network.name}: gate passed", flush=True)
        makers = cycle_makers(network, batch, names)
        steps = _prepared(makers)
        failed += len(makers) - len(steps)
        lengths = {name: turn_length(training_of(name.removesuffix(" solving")), device) for name in steps}
        timings, peaks = measure(steps, lengths, batch, rounds=options.rounds)
        measured = cycle_rows(timings, peaks, epochs=options.epochs)
        jsonl.append(
            options.output,
            [{"network": network.name, "size": options.size, **row, **where} for row in measured],
        )
        print(tabulate(measured, "keys", floatfmt=".4g"), flush=True)
    return failed


def _prepared(makers: Mapping[str, Callable[[], Step]]) -> dict[str, Step]:
    """Return the contenders' cycles, warmed up; those that fail are named."""
    steps: dict[str, Step] = {}

    def prepare(name: str) -> None:
        start = time.monotonic()
        steps[name] = makers[name]()
        print(f"  {name}: ready after {time.monotonic() - start:.1f} s", flush=True)

    for name in makers:
        attempt(name, partial(prepare, name))
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    arguments.add_device(parser)
    parser.add_argument("--size", choices=tuple(NETWORKS), default="small")
    parser.add_argument("--network", nargs="+", choices=("resnet", "transformer"), help="default: both")
    parser.add_argument("--method", nargs="+", choices=TRAINING_NAMES, help="default: all that can run here")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=30, help="FNGD's average is over so many epochs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=jsonl.RESULTS / "peers.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main() > 0)
