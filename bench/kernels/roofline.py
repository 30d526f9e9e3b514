"""The time below which the hardware cannot do a piece of work."""

from dataclasses import dataclass

from bench.kernels.ceilings import Ceilings


@dataclass(frozen=True)
class Work:
    """Multiply-adds by arithmetic, and bytes of the inputs and the result, each moved once."""

    products: tuple[tuple[int, str], ...]
    bytes_moved: int

    @property
    def macs(self) -> int:
        """Return the multiply-adds of all arithmetic."""
        return sum(macs for macs, _ in self.products)


def roofline(work: Work, ceilings: Ceilings | None) -> tuple[float, str] | None:
    """Return the least seconds for the work, and "compute" or "memory", from measured ceilings."""
    if ceilings is None:
        return None
    compute = sum(2 * macs / ceilings.flops[arithmetic] for macs, arithmetic in work.products)
    memory = work.bytes_moved / ceilings.bytes_per_second
    return (compute, "compute") if compute > memory else (memory, "memory")
