"""The damped solve against torch.linalg on batches of small systems, on one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate
from torch import Tensor

import fngd_kernels as fk
from bench import environment, record
from bench.timing import round_robin
from fngd_kernels import native

CPU = torch.device("cpu")
ROUNDS = 31
WARMUP = 3
DAMPING = 0.1
SHAPES = ((20, 64), (20, 128), (8, 256), (1, 1024))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Figures are per thread; the threads of other libraries follow torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("batch", "order"), SHAPES, ids=[f"{b}x{n}" for b, n in SHAPES])
def test_solve(
    benchmark: BenchmarkFixture,
    batch: int,
    order: int,
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check the residuals, time both in turns, append the rows."""
    torch.manual_seed(0)
    features = torch.randn(batch, order, 2 * order, dtype=dtype)
    k = features @ features.mT / (2 * order)
    rhs = torch.randn(batch, order, dtype=dtype)
    contenders = {
        "fngd_kernels.solve": lambda: fk.solve(k, DAMPING, rhs),
        "torch.linalg": lambda: solve_with_torch(k, rhs),
    }
    errors = {name: residual(k, rhs, solve()) for name, solve in contenders.items()}
    tolerance = 32 * torch.finfo(dtype).eps
    assert max(errors.values()) <= tolerance, f"residuals {errors}, over {tolerance:.0e}"

    rounds, warmup = (ROUNDS, WARMUP) if benchmark.enabled else (1, 1)
    timings = benchmark.pedantic(
        round_robin, args=(contenders,), kwargs={"rounds": rounds, "warmup": warmup, "device": CPU}
    )
    baseline = timings["torch.linalg"].median
    rows = [
        {
            "contender": name,
            "baseline": "torch.linalg",
            "ratio": timing.median / baseline,
            "median_s": timing.median,
            "p20_s": timing.p20,
            "p80_s": timing.p80,
            "rounds": len(timing.samples),
            "residual": errors[name],
        }
        for name, timing in timings.items()
    ]
    case = f"solve {batch} x {order} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info.update({row["contender"]: row for row in rows})
    with capsys.disabled():
        print(f"\n{case}\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
    if benchmark.enabled:
        where = environment.describe(CPU)
        record.append(record.RESULTS / "cpu.jsonl", [{"network": case, **row, **where} for row in rows])


def solve_with_torch(k: Tensor, rhs: Tensor) -> Tensor:
    """Solve as one would in plain torch, the copy that takes the damping included."""
    shifted = k.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    lower, _ = torch.linalg.cholesky_ex(shifted)
    return torch.cholesky_solve(rhs[..., None], lower)[..., 0]


def residual(k: Tensor, rhs: Tensor, x: Tensor) -> float:
    """Return the largest |rhs - (K + damping I) x| / |rhs| of the batch, in float64."""
    k, rhs, x = k.double(), rhs.double(), x.double()
    left = (k @ x[..., None])[..., 0] + DAMPING * x
    return ((rhs - left).norm(dim=-1) / rhs.norm(dim=-1)).max().item()
