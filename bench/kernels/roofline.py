"""The time below which the hardware cannot do a piece of work."""

from dataclasses import dataclass

from bench.kernels.ceilings import Ceilings

_FLOPS = {"bf16": 790e12, "tf32": 395e12, "fp32": 51e12}
ASSUMED = {"H100": Ceilings(3.0e12, _FLOPS), "H200": Ceilings(4.2e12, _FLOPS)}
"""Rates assumed where no GPU is at hand; `bench.kernels.ceilings` measures those of one that is."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds by arithmetic, and bytes of the inputs and the result, each moved once."""

    products: tuple[tuple[int, str], ...]
    bytes_moved: int

    @property
    def macs(self) -> int:
        """Return the multiply-adds of all arithmetic."""
        return sum(macs for macs, _ in self.products)

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Return the least seconds for the work, and "compute" or "memory"."""
        compute = sum(2 * macs / ceilings.flops[arithmetic] for macs, arithmetic in self.products)
        memory = self.bytes_moved / ceilings.bytes_per_second
        return (compute, "compute") if compute > memory else (memory, "memory")


def roofline(work: Work, ceilings: Ceilings | None) -> tuple[float, str] | None:
    """Return the floor of the work under measured ceilings, where there are some."""
    return None if ceilings is None else work.floor(ceilings)
