"""Time a step of every optimizer over SGD's: `python -m bench.peers --device cuda --size gpu`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from bench.peers import TRAINING_NAMES, available, training_of
from bench.peers.cycles import BASELINE, contenders, measure, rows, turn_length
from bench.steps import gate, networks
from bench.steps.networks import Network
from bench.tools import environment, jsonl
from bench.tools.timing import Step

# every method once: a step of FNGD exact is the solving step of FNGD shared
DEFAULT = tuple(name for name in TRAINING_NAMES if training_of(name).solves != "always")
NETWORKS: dict[str, dict[str, Network]] = {
    "tiny": {name: sizes["small"] for name, sizes in networks.MIXED.items()},
    "small": {"resnet": networks.RESNET, "transformer": networks.TRANSFORMER},
    "gpu": {name: sizes["gpu"] for name, sizes in networks.MIXED.items()},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Append the rows of each network as they come; return how many contenders failed."""
    options = _parser().parse_args(arguments)
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
        try:
            gate.check(network, batch)
        except Exception as error:
            # no figure without its gate; the other network still gets its own
            failed += 1
            print(f"FAILED {network.name}, gate: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{network.name}: gate passed", flush=True)
        steps: dict[str, Step] = {}
        for name, make in contenders(network, batch, names).items():
            start = time.monotonic()
            try:
                steps[name] = make()
            except Exception as error:
                # one library that fails here must not cost the others their figures
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"  {name}: ready after {time.monotonic() - start:.1f} s", flush=True)
        lengths = {name: turn_length(training_of(name.removesuffix(" solving")), device) for name in steps}
        timings, peaks = measure(steps, lengths, batch, rounds=options.rounds)
        measured = rows(timings, peaks, epochs=options.epochs)
        jsonl.append(
            options.output,
            [{"network": network.name, "size": options.size, **row, **where} for row in measured],
        )
        print(tabulate(measured, "keys", floatfmt=".4g"), flush=True)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
