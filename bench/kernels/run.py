"""A case measured: gate in float64, then times, then rows for the results file."""

from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case
from bench.kernels.ceilings import Ceilings
from bench.kernels.cold_timing import buffers_for, measure, workspace
from bench.kernels.roofline import roofline
from bench.tools.jsonl import Row
from bench.tools.timing import columns

# On top of twice the error of the best plain way, of the largest entry.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}

# What a contender is called that takes whatever way the package chooses; others are launched as they are.
PATHS = {"fngd": "dispatched"}


def run(case: Case, *, rounds: int, device: torch.device, ceilings: Ceilings | None = None) -> list[Row]:
    """Return one row for each contender.

    Args:
        ceilings: Of the device, for shares of the roofline.

    Raises:
        AssertionError: When a kernel's error exceeds twice the best plain one's and a tolerance.
    """
    first = case.inputs()
    errors = check(case, first)
    held = {name: workspace(contender.run, first, device) for name, contender in case.contenders.items()}
    sets = [first, *(case.inputs() for _ in range(buffers_for(first, device) - 1))]
    timings, how = measure(
        {name: contender.run for name, contender in case.contenders.items()},
        sets,
        rounds=rounds,
        device=device,
    )
    baseline = _baseline(case, {name: timing.median for name, timing in timings.items()})
    rows: list[Row] = []
    for name, contender in case.contenders.items():
        limit = roofline(contender.work, ceilings)
        rows.append(
            {
                "op": case.op,
                "network": case.network,
                "layer": case.layer,
                "batch": case.batch,
                "dtype": str(case.dtype).removeprefix("torch."),
                "contender": name,
                "role": contender.role,
                "path": "library on the CPU" if device.type == "cpu" else PATHS.get(name, "direct"),
                "baseline": baseline,
                **columns(timings, name, baseline),
                "buffers": len(sets),
                "timed": how,
                "error": errors.get(name),
                "macs": contender.work.macs,
                "bytes_moved": contender.work.bytes_moved,
                "roofline_s": limit[0] if limit else None,
                "bound": limit[1] if limit else None,
                "percent_of_roofline": 100 * limit[0] / timings[name].median if limit else None,
                "workspace_bytes": held[name],
            }
        )
    return rows


def check(case: Case, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the error of every contender that computes the case's result, against float64.

    Raises:
        AssertionError: When a kernel's error exceeds twice the best plain one's and a tolerance.
    """
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    truth = _parts(case.truth(*wide))
    errors = {
        name: _error(_parts(contender.run(*inputs)), truth)
        for name, contender in case.contenders.items()
        if contender.role != "unweighted"
    }
    plain = min(error for name, error in errors.items() if case.contenders[name].role == "plain")
    allowed = 2 * plain + TOLERANCE[case.dtype]
    for name, error in errors.items():
        # Written so that NaN fails.
        if case.contenders[name].role == "fngd" and not error <= allowed:
            raise AssertionError(f"{case.name}: error of {name} {error:.1e}, over {allowed:.1e}")
    return errors


def _baseline(case: Case, medians: dict[str, float]) -> str:
    """Return the fastest plain way, the unweighted one where there is one."""
    roles = {name: contender.role for name, contender in case.contenders.items()}
    role = "unweighted" if "unweighted" in roles.values() else "plain"
    return min((name for name in medians if roles[name] == role), key=medians.__getitem__)


def _parts(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _error(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Return the largest deviation over the largest entry, of the worst part."""
    return max(
        float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(actual, truth, strict=True)
    )
