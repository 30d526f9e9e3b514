"""Time training steps against the base optimizer's: `python -m bench.steps --device cuda --size gpu`."""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from tabulate import tabulate

from bench.steps import gate
from bench.steps.contenders import BASES, MODES
from bench.steps.measure import measure, prepare
from bench.steps.networks import MIXED
from bench.tools import arguments, environment, jsonl
from bench.tools.attempt import attempt


def main(argv: Sequence[str] | None = None) -> int:
    """Gate each network, time every case and append its rows; return how many figures are missing."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    modes = options.mode or [mode for mode in MODES if mode != "graphed" or device.type == "cuda"]
    rounds, calls = options.rounds, 10 if device.type == "cuda" else 1
    where = environment.describe(device)
    output = options.output or arguments.device_rows(device)
    start, missing = time.monotonic(), 0
    for name in options.network:
        network = MIXED[name][options.size]
        batch = network.draw(device)
        # No figure without its gate; the other network still gets its own.
        if not attempt(f"{network.name}, gate", partial(gate.check, network, batch)):
            missing += 1
            continue
        print(f"{network.name}: gate passed after {time.monotonic() - start:.0f} s", flush=True)
        gated = {"eager": True}
        for mode, base in itertools.product(modes, options.base):
            case = {"network": network.name, "mode": mode, "base": base}
            if time.monotonic() - start > options.seconds:
                missing += 1
                print(f"no time left for {', '.join(case.values())}")
                continue
            # Every model counts against the number of times that torch compiles the same code.
            torch.compiler.reset()
            if mode not in gated:
                gate_of_mode = partial(gate.check_mode, network, batch, mode)
                gated[mode] = attempt(f"{network.name}, {mode}, gate", gate_of_mode)
            steps, failed = prepare(network, batch, base, mode, weighted=gated[mode])
            missing += failed
            if not any(contender.startswith(base) for contender in steps):
                continue
            measured = measure(steps, base, device, rounds=rounds, calls=calls, memory=mode != "graphed")
            jsonl.append(output, [{**case, **row, **where} for row in measured])
            print(f"\n{', '.join(case.values())}\n{tabulate(measured, 'keys', floatfmt='.4g')}", flush=True)
    return missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    arguments.add_device(parser)
    parser.add_argument("--size", choices=("small", "gpu"), default="small")
    parser.add_argument("--network", nargs="+", choices=MIXED, default=list(MIXED))
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: all that the device has")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after that time")
    arguments.add_device_rows(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main() > 0)
