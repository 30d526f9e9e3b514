"""Time training steps against the base optimizer's: `python -m bench.steps --device cuda --size gpu`."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from bench.steps import gate
from bench.steps.contenders import BASES, MODES, contenders
from bench.steps.networks import MIXED, Batch, Network
from bench.tools import environment, jsonl
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Step, Timing, round_robin

WARMUP = 3

Row = dict[str, str | float | int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Gate each network, time every case and append its rows; return how many figures are missing."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    modes = options.mode or [mode for mode in MODES if mode != "graphed" or device.type == "cuda"]
    rounds, calls = options.rounds, 10 if device.type == "cuda" else 1
    where = environment.describe(device)
    output = options.output or jsonl.RESULTS / ("gpu.jsonl" if device.type == "cuda" else "cpu.jsonl")
    start, missing = time.monotonic(), 0
    for name in options.network:
        network = MIXED[name][options.size]
        batch = network.draw(device)
        # no figure without its gate; the other network still gets its own
        if not _passes(f"{network.name}, gate", partial(gate.check, network, batch)):
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
            # every model counts against the number of times that torch compiles the same code
            torch.compiler.reset()
            if mode not in gated:
                gate_of_mode = partial(gate.check_mode, network, batch, mode)
                gated[mode] = _passes(f"{network.name}, {mode}, gate", gate_of_mode)
            steps, failed = _prepared(network, batch, base, mode, weighted=gated[mode])
            missing += failed
            if not any(contender.startswith(base) for contender in steps):
                continue
            measured = _measured(steps, base, device, rounds=rounds, calls=calls, memory=mode != "graphed")
            jsonl.append(output, [{**case, **row, **where} for row in measured])
            print(f"\n{', '.join(case.values())}\n{tabulate(measured, 'keys', floatfmt='.4g')}", flush=True)
    return missing


def _passes(what: str, check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception as error:
        print(f"FAILED {what}: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def _prepared(
    network: Network, batch: Batch, base: str, mode: str, *, weighted: bool
) -> tuple[dict[str, Step], int]:
    """Return the contenders' steps, warmed up, and how many are missing: those that fail are named.

    weighted: whether FNGD is among them
    """
    steps: dict[str, Step] = {}
    made = contenders(network, batch, base, mode)

    def prepare(name: str) -> None:
        step = made[name]()
        for _ in range(WARMUP):
            step()
        steps[name] = step

    for name in made:
        if weighted or name.startswith(base):
            _passes(f"{network.name}, {mode}, {base}, {name}", partial(prepare, name))
    return steps, len(made) - len(steps)


def _measured(
    steps: Mapping[str, Step], base: str, device: torch.device, *, rounds: int, calls: int, memory: bool
) -> list[Row]:
    timings = round_robin(steps, rounds=rounds, warmup=1, device=device, calls=calls)
    peaks = {name: peak_memory(step, device) if memory else None for name, step in steps.items()}
    fastest = min((name for name in steps if name.startswith(base)), key=lambda name: timings[name].median)
    return rows(timings, peaks, dict.fromkeys(steps, fastest))


def rows(
    timings: Mapping[str, Timing], peaks: Mapping[str, int | None], baselines: Mapping[str, str]
) -> list[Row]:
    """One row per contender; ratio and extra memory are over its baseline."""
    return [
        {
            "contender": name,
            "baseline": baseline,
            "ratio": timings[name].median / timings[baseline].median,
            "median_s": timings[name].median,
            "p20_s": timings[name].p20,
            "p80_s": timings[name].p80,
            "rounds": len(timings[name].samples),
            "peak_bytes": peaks[name],
            "extra_bytes": _excess(peaks[name], peaks[baseline]),
        }
        for name, baseline in baselines.items()
    ]


def _excess(bytes_: int | None, over: int | None) -> int | None:
    return None if bytes_ is None or over is None else bytes_ - over


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.steps", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("small", "gpu"), default="small")
    parser.add_argument("--network", nargs="+", choices=MIXED, default=list(MIXED))
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: all that the device has")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after that time")
    parser.add_argument("--output", type=Path, help="default: gpu.jsonl or cpu.jsonl among the results")
    return parser


if __name__ == "__main__":
    raise SystemExit(main() > 0)
