"""Time the kernels over real layer shapes: `python -m bench.kernels --quick --shapes gram`."""

import argparse
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.kernels import table
from bench.kernels.cases import cases
from bench.kernels.ceilings import CEILINGS, known
from bench.kernels.run import Row, check, run
from bench.kernels.shapes import NETWORKS, TINY
from bench.tools import arguments, environment, jsonl
from bench.tools.precision import allow_tf32
from bench.tools.timing import synchronise

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@allow_tf32(False)
def main(argv: Sequence[str] | None = None) -> int:
    """Gate, time and record every case, float32 multiplied as such; return how many failed."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        print("on the CPU: fngd takes its library path, there is no roofline")
    dtypes = options.dtypes or (["bfloat16"] if options.quick else ["bfloat16", "float32"])
    networks = [TINY] if options.tiny else NETWORKS
    rounds = options.rounds or (7 if options.quick else 21)
    where = environment.describe(device)
    chosen = [
        case
        for case in cases(networks, [DTYPES[name] for name in dtypes], device, quick=options.quick)
        if re.search(options.shapes, case.name)
    ]
    # What fits into --seconds is then a fair sample, but for what is asked for first.
    random.Random(0).shuffle(chosen)
    chosen.sort(key=lambda case: re.search(options.first, case.name) is None)
    ceilings = None if options.gate else known(options.ceilings, device)
    done: list[Row] = []
    failed = taken = 0
    start = time.monotonic()
    for case in chosen:
        if time.monotonic() - start > options.seconds:
            break
        taken += 1
        torch.manual_seed(0)
        try:
            if options.gate:
                print(case.name, check(case, case.inputs()), sep=" | ", flush=True)
                continue
            rows = run(case, rounds=rounds, device=device, ceilings=ceilings)
        except Exception as error:
            # A kernel that is wrong, fails or does not compile gets no figure; the other cases still do.
            failed += 1
            print(f"FAILED {case.name}: {type(error).__name__}: {error}", flush=True)
            if not _usable(device):
                print("the device is lost to this process: no further case", flush=True)
                break
            continue
        rows = [{**row, **where} for row in rows]
        jsonl.append(options.output, rows)
        done += rows
        print(case.name, *(f"{row['contender']} {row['median_s'] * 1e6:.1f} us" for row in rows), sep=" | ")
    print(f"\n{taken} of {len(chosen)} cases, {failed} failed")
    if done:
        print("ratio: fastest kernel over fastest plain way, geometric mean", table.table(done), sep="\n")
    return failed


def _usable(device: torch.device) -> bool:
    """Return whether kernels can still run: after an illegal access none can."""
    try:
        synchronise(device)
    except RuntimeError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    arguments.add_device(parser)
    parser.add_argument("--quick", action="store_true", help="each shape once, bf16: for the geometric means")
    parser.add_argument("--tiny", action="store_true", help="a few tiny layers of every kind")
    parser.add_argument("--gate", action="store_true", help="check against float64, time nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after that time")
    parser.add_argument("--shapes", default="", metavar="REGEX", help="op/network/layer/N=batch/dtype")
    parser.add_argument(
        "--first", default="", metavar="REGEX", help="begin with these, named as for --shapes"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--ceilings", type=Path, default=CEILINGS, help="measured where it lacks this device")
    parser.add_argument("--output", type=Path, default=jsonl.RESULTS / "kernels.jsonl")
    return parser


if __name__ == "__main__":
    raise SystemExit(main() > 0)
