"""Show where the time of a step goes, FNGD beside the base optimizer: `python -m bench.steps.profile`."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.steps import trace
from bench.steps.contenders import BASES, MODES, step_makers
from bench.steps.networks import MIXED
from bench.steps.trace import OTHER, PHASES, STEP, Summary
from bench.tools import arguments, environment
from bench.tools.timing import Step, synchronise

WARMUP = 3
TOP = 12

Calls = dict[str, tuple[float, ...]]
"""By name, of one step: the number of calls, then milliseconds of each side that there is (host, device)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Profile each contender; leave a trace of each, and the tables as Markdown and as JSON."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    for mode in options.mode:
        with tempfile.TemporaryDirectory() as folder:
            _report(mode, device, options.output if options.traces else Path(folder), options)


def _report(mode: str, device: torch.device, traces: Path, options: argparse.Namespace) -> None:
    network = MIXED[options.network][options.size]
    batch = network.draw(device)
    # On CUDA the fused form, which FNGD takes there.
    base = f"{options.base} fused" if device.type == "cuda" else options.base
    made = step_makers(network, batch, options.base, mode, record_function)
    name = f"{options.network}-{mode}-{options.base}"
    options.output.mkdir(parents=True, exist_ok=True)

    summaries: dict[str, Summary] = {}
    operators: dict[str, Calls] = {}
    kernels: dict[str, Calls] = {}
    for contender in (base, *(other for other in made if other.startswith("fngd"))):
        path = traces / f"{name}-{contender.replace(' ', '-')}.json.gz"
        profiler = _profiled(made[contender](), options.steps, device)
        profiler.export_chrome_trace(str(path))
        summaries[contender] = trace.summarize(trace.load(path))
        operators[contender], kernels[contender] = _calls(profiler, options.steps, device)

    sides = ("host", "device") if device.type == "cuda" else ("host",)
    where = environment.describe(device)
    tables = [f"## {network.name}, {mode}, {where['gpu'] or where['cpu']}"]
    tables += [totals(summaries, device), phases(summaries, sides)]
    for contender in list(summaries)[1:]:
        tables.append(differences("operator", sides, operators, base, contender))
        if device.type == "cuda":
            tables.append(differences("kernel", ("device",), kernels, base, contender))
    text = "\n\n".join(tables) + "\n"
    print(text, flush=True)
    (options.output / f"{name}.md").write_text(text)
    report = {
        "network": network.name,
        "mode": mode,
        "base": base,
        **where,
        "summaries": {contender: asdict(summary) for contender, summary in summaries.items()},
        "operators": operators,
        "kernels": kernels,
    }
    (options.output / f"{name}.json").write_text(json.dumps(report, indent=1))


def _profiled(step: Step, steps: int, device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(WARMUP):
        step()
    synchronise(device)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
        synchronise(device)
    return profiler


def _calls(profiler: profile, steps: int, device: torch.device) -> tuple[Calls, Calls]:
    """Return operators, with their own time on the host and on a device, and the kernels of a device."""
    operators: Calls = {}
    kernels: Calls = {}
    for event in profiler.key_averages():
        if event.is_user_annotation or event.key in (STEP, *PHASES):
            continue
        calls, host, work = (
            value / steps
            for value in (event.count, event.self_cpu_time_total / 1e3, event.self_device_time_total / 1e3)
        )
        if event.device_type != DeviceType.CPU:
            kernels[event.key] = (calls, work)
        else:
            operators[event.key] = (calls, host, work) if device.type == "cuda" else (calls, host)
    return operators, kernels


def totals(summaries: dict[str, Summary], device: torch.device) -> str:
    """Return the table of whole steps."""
    rows: dict[str, list[float]] = {"time, ms": [s.wall_ms for s in summaries.values()]}
    if device.type == "cuda":
        rows["the device works, ms"] = [s.device_ms for s in summaries.values()]
        rows["kernels"] = [s.kernels for s in summaries.values()]
        rows["launches by the host"] = [s.launches for s in summaries.values()]
        rows["waits for the device"] = [s.waits for s in summaries.values()]
    return _table(["one step", *summaries], [[name, *values] for name, values in rows.items()])


def phases(summaries: dict[str, Summary], sides: Sequence[str]) -> str:
    """Return the table of phases: time on the host, and on the device of what was launched there."""
    header = [f"{contender}, {side} ms" for contender in summaries for side in sides]
    rows = [
        [name, *(getattr(s.phases[name], f"{side}_ms") for s in summaries.values() for side in sides)]
        for name in (*PHASES, OTHER)
    ]
    return _table(["phase", *header], rows)


def differences(kind: str, sides: Sequence[str], calls: dict[str, Calls], base: str, contender: str) -> str:
    """Return the table of the operators or kernels whose own times differ most from the base optimizer's."""
    nothing = (0.0,) * (1 + len(sides))
    rows = []
    for name in calls[base].keys() | calls[contender].keys():
        plain, weighted = (calls[of].get(name, nothing) for of in (base, contender))
        more = sum(abs(b - a) for a, b in zip(plain[1:], weighted[1:], strict=True))
        pairs = zip(plain, weighted, strict=True)
        rows.append((-more, name, [name[:60], *(x for pair in pairs for x in pair)]))
    columns = ["calls", *(f"{side} ms" for side in sides)]
    header = [f"{column}, {of}" for column in columns for of in (base, contender)]
    return _table([kind, *header], [row for _, _, row in sorted(rows)[:TOP]])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return tabulate(rows, header, tablefmt="github", floatfmt=".4g")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.steps.profile", description=__doc__)
    parser.add_argument("--network", choices=MIXED, default="resnet")
    parser.add_argument("--size", choices=("small", "gpu"), default="small")
    arguments.add_device(parser)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--base", choices=BASES, default="sgd")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-traces", dest="traces", action="store_false", help="leave the tables alone")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"))
    return parser


if __name__ == "__main__":
    main()
