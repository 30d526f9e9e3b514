"""What the device at hand can do at most, measured: `python -m bench.kernels.ceilings`."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.tools import arguments, environment, jsonl
from bench.tools.precision import allow_tf32
from bench.tools.timing import round_robin

CEILINGS = jsonl.RESULTS / "ceilings.jsonl"


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read and written, of a copy; operations a second of a matrix product by arithmetic."""

    bytes_per_second: float
    flops: dict[str, float]


def known(path: Path, device: torch.device) -> Ceilings | None:
    """Return the ceilings of this device: the last ones in `path`, else those measured now and added to it.

    None off CUDA.
    """
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_name(device)
    for row in reversed(jsonl.read(path)):
        if row["gpu"] == gpu:
            return Ceilings(row["bytes_per_second"], row["flops"])
    ceilings = measure(device)
    jsonl.append(path, [asdict(ceilings) | environment.describe(device)])
    return ceilings


def measure(device: torch.device, *, order: int = 8192, copied: int = 1 << 32) -> Ceilings:
    """Time a copy of `copied` bytes, and products of matrices of `order` by torch's own library.

    The matrices are random: a GPU multiplies zeros faster.
    """
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * copied / _seconds(lambda: target.copy_(source), device)
    flops = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        x, y = (torch.randn(order, order, device=device).to(dtype) for _ in range(2))
        with allow_tf32(tf32):
            flops[name] = 2 * order**3 / _seconds(lambda x=x, y=y: x @ y, device)  # type: ignore[misc]
    return Ceilings(moved, flops)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return round_robin({"": run}, rounds=5, warmup=2, device=device, calls=3)[""].median


def main(argv: Sequence[str] | None = None) -> None:
    """Print the ceilings, and record those of a CUDA device that has none in the file yet."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.ceilings", description=__doc__)
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=CEILINGS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    ceilings = known(options.output, device) or measure(device, order=512, copied=1 << 24)
    print(f"copy {ceilings.bytes_per_second / 1e9:.4g} GB/s, read and written")
    for name, flops in ceilings.flops.items():
        print(f"{name} matrix product {flops / 1e12:.3g} TFLOP/s")


if __name__ == "__main__":
    main()
