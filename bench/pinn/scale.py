"""Time and memory of Gauss-Newton over points and parameters, beside 20 iterations of L-BFGS."""

import argparse
import time
from itertools import product
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fngd
from bench.pinn.gauss_newton import network, residuals
from bench.tools import environment, jsonl
from bench.tools.jsonl import Row
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Step

DIMENSIONS = 2
LBFGS_ITERATIONS = 20
# From few to many parameters: 5 thousand, 21 thousand, 200 thousand, a million.
WIDTHS = (48, 100, 315, 705)
POINTS = (500, 2000, 5000, 20000)


def row(points: int, width: int, dtype: torch.dtype, steps: int, device: torch.device) -> Row:
    """Return what some steps of either method take and reach, from the same initial network."""
    torch.manual_seed(0)
    x = torch.rand(points, DIMENSIONS, dtype=dtype, device=device)
    model, other = (network(DIMENSIONS, width, device, dtype) for _ in range(2))
    first = float(_loss(model, x).detach())
    lbfgs_seconds = _seconds(lambda: _lbfgs(other, x), device)
    optimizer = fngd.GaussNewton(model)
    seconds = _seconds(lambda: [optimizer.step(lambda: residuals(model, x)) for _ in range(steps)], device)
    after, stats = float(_loss(model, x).detach()), optimizer.stats()
    peak = peak_memory(lambda: optimizer.step(lambda: residuals(model, x)), device)
    return {
        "points": points,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "solver": stats["solver"],
        "step_s": seconds / steps,
        "lbfgs_s": lbfgs_seconds,
        "peak_bytes": peak,
        "iterations": stats["iterations"],
        "loss_before": first,
        f"loss_after_{steps}_steps": after,
        "loss_after_lbfgs": float(_loss(other, x).detach()),
    }


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return residuals(model, x).square().mean()


def _lbfgs(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=LBFGS_ITERATIONS,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(model, x)
        loss.backward(inputs=list(model.parameters()))
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def _seconds(run: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Measure every case; append the rows as they come."""
    parser = argparse.ArgumentParser(prog="python -m bench.pinn.scale", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--points", type=int, nargs="+", default=POINTS)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS, help="of three hidden layers")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--steps", type=int, default=5, help="of GaussNewton (default: 5)")
    parser.add_argument("--output", type=Path, help="JSONL file to append to (default: none)")
    options = parser.parse_args(argv)
    device, rows = torch.device(options.device), []
    for width, points in product(options.width, options.points):
        rows.append(row(points, width, getattr(torch, options.dtype), options.steps, device))
        if options.output is not None:
            jsonl.append(options.output, [rows[-1] | environment.describe(device)])
        print(f"\n{tabulate(rows, headers='keys', floatfmt='.3g')}", flush=True)


if __name__ == "__main__":
    main()
