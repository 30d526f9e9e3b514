"""The time below which the hardware cannot do a piece of work."""

from __future__ import annotations

from dataclasses import dataclass

# Dense rates of NVIDIA's H200 SXM data sheet, 2024; its tensor rates are listed with sparsity, twice these.
H200_BYTES_PER_SECOND = 4.8e12
H200_FLOPS = {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}

HARDWARE = {"H200": (H200_BYTES_PER_SECOND, H200_FLOPS)}


@dataclass(frozen=True)
class Work:
    """Multiply-adds by arithmetic, and bytes of the inputs and the result, each moved once."""

    products: tuple[tuple[int, str], ...]
    bytes_moved: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all arithmetic."""
        return sum(macs for macs, _ in self.products)


def roofline(work: Work, gpu: str | None) -> tuple[float, str] | None:
    """Return the least seconds for the work, and "compute" or "memory", on a GPU with known rates."""
    rates = next((rates for name, rates in HARDWARE.items() if gpu and name in gpu), None)
    if rates is None:
        return None
    bytes_per_second, flops = rates
    compute = sum(2 * macs / flops[arithmetic] for macs, arithmetic in work.products)
    memory = work.bytes_moved / bytes_per_second
    return (compute, "compute") if compute > memory else (memory, "memory")
