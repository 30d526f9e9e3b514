"""Time batched damped solves against torch.linalg: `python -m bench.kernels.solves --device cuda`."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor

import fngd_kernels as fk
from bench.tools import arguments, environment, jsonl
from bench.tools.jsonl import Row
from bench.tools.timing import Timing, columns, round_robin
from fngd_kernels.ops.coefficients import coefficients

DAMPING = 0.1
DTYPES = {"float32": torch.float32, "float64": torch.float64}
BATCHES = (1, 16, 64)
ORDERS = (32, 64, 128, 256)
# Ours first, torch's second.
NAMES = {
    "solve": ("fngd_kernels.solve", "torch.linalg"),
    "coefficients": ("fngd coefficients", "torch.linalg"),
}


@dataclass(frozen=True)
class Case:
    """One computation on a batch of systems by each contender, and the error that its results may have."""

    name: str
    baseline: str
    contenders: Mapping[str, Callable[[], Tensor]]
    error: Callable[[Tensor], float]
    tolerance: float

    def check(self) -> dict[str, float]:
        """Return the error of every contender.

        Raises:
            AssertionError: When one is over the tolerance.
        """
        errors = {name: self.error(run()) for name, run in self.contenders.items()}
        # Written so that NaN fails.
        if not all(error <= self.tolerance for error in errors.values()):
            raise AssertionError(f"{self.name}: errors {errors}, over {self.tolerance:.0e}")
        return errors


def make(kind: str, batch: int, order: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of `kind`: "solve" or "coefficients"."""
    torch.manual_seed(0)
    features = torch.randn(batch, order, 2 * order, dtype=dtype, device=device)
    k = features @ features.mT / (2 * order)
    rhs = torch.randn(batch, order, dtype=dtype, device=device)
    runs: tuple[Callable[[], Tensor], ...]
    if kind == "solve":
        runs = (lambda: fk.solve(k, DAMPING, rhs), lambda: solve_with_torch(k, rhs))
        error = partial(residual, k, rhs)
    else:
        runs = (lambda: coefficients(k, DAMPING, "trace", "mean")[0], lambda: coefficients_with_torch(k))
        error = partial(unevenness, k)
    return Case(
        name=f"{kind} {batch} x {order} {str(dtype).removeprefix('torch.')}",
        baseline=NAMES[kind][1],
        contenders=dict(zip(NAMES[kind], runs, strict=True)),
        error=error,
        tolerance=32 * torch.finfo(dtype).eps,
    )


def solve_with_torch(k: Tensor, rhs: Tensor) -> Tensor:
    """Solve as one would in plain torch, the copy that takes the damping included."""
    shifted = k.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    lower, _ = torch.linalg.cholesky_ex(shifted)
    return torch.cholesky_solve(rhs[..., None], lower)[..., 0]


def coefficients_with_torch(k: Tensor) -> Tensor:
    """Compute FNGD's default weights in the fewest calls of torch, without its guards."""
    shifted = k.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(diagonal.sum(-1, keepdim=True) * DAMPING)
    lower, _ = torch.linalg.cholesky_ex(shifted)
    v = torch.cholesky_solve(k.new_ones(*k.shape[:-1], 1), lower)[..., 0]
    return v / v.mean(-1, keepdim=True)


def residual(k: Tensor, rhs: Tensor, x: Tensor) -> float:
    """Return the largest |rhs - (K + damping I) x| / |rhs| of the batch, in float64."""
    k, rhs, x = k.double(), rhs.double(), x.double()
    left = (k @ x[..., None])[..., 0] + DAMPING * x
    return ((rhs - left).norm(dim=-1) / rhs.norm(dim=-1)).max().item()


def unevenness(k: Tensor, s: Tensor) -> float:
    """Return the largest relative residual of (K + lam I) v = 1 with s = v / mean(v), in float64.

    What the left side makes of s is the same number in every row, and the mean of s is 1.
    """
    k, s = k.double(), s.double()
    damping = DAMPING * k.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    left = (k @ s[..., None])[..., 0] + damping * s
    uneven = (left / left.mean(-1, keepdim=True) - 1).square().mean(-1).sqrt()
    return float(torch.maximum(uneven, (s.mean(-1) - 1).abs()).max())


def solve_rows(case: Case, timings: Mapping[str, Timing], errors: Mapping[str, float]) -> list[Row]:
    """Return a row of each contender."""
    return [
        {
            "network": case.name,
            "contender": name,
            "baseline": case.baseline,
            **columns(timings, name, case.baseline),
            "residual": errors[name],
        }
        for name in timings
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time and record every case; return how many failed."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    calls = 20 if device.type == "cuda" else 1
    where = environment.describe(device)
    output = options.output or arguments.device_rows(device)
    failed = 0
    done: list[Row] = []
    for kind, dtype, batch, order in itertools.product(
        NAMES, options.dtypes, options.batches, options.orders
    ):
        try:
            case = make(kind, batch, order, DTYPES[dtype], device)
            errors = case.check()
            timings = round_robin(
                case.contenders, rounds=options.rounds, warmup=3, device=device, calls=calls
            )
        except Exception as error:
            failed += 1
            print(f"FAILED {kind} {batch} x {order} {dtype}: {type(error).__name__}: {error}", flush=True)
            continue
        measured = solve_rows(case, timings, errors)
        jsonl.append(output, [{**row, **where} for row in measured])
        done += measured
    print(tabulate(done, headers="keys", floatfmt=".4g"))
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.solves", description=__doc__)
    arguments.add_device(parser)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--orders", nargs="+", type=int, default=ORDERS)
    parser.add_argument("--rounds", type=int, default=25)
    arguments.add_device_rows(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main() > 0)
