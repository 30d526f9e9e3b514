"""The samples of one forward."""

import torch
from torch import Tensor


class Batch:
    """The samples of one forward, and their coefficients where they are known.

    Attributes:
        size: The number N of rows, None where each layer takes the rows of its own input as samples.
        ids: (n,) int64 on the CPU, the samples' columns in the table, None where they have no ids.
        columns: Ids on the table's device.
        coefficients: (blocks, N), None where they are to be solved for.
        rows: The rows of coefficients, one per block.
        sample_of: (N,) the place in ids of each row's sample, None where every row is a sample of its own.
        why_plain: Why its gradient is plain, "" if it need not be.
        certain: False where a call may be of another batch, which its input tells.
        used: Whether a forward has taken it.
    """

    def __init__(
        self,
        size: int | None,
        ids: Tensor | None = None,
        columns: Tensor | None = None,
        coefficients: Tensor | None = None,
        *,
        sample_of: Tensor | None = None,
        why_plain: str = "",
        certain: bool = True,
    ) -> None:
        self.size, self.ids, self.columns, self.coefficients = size, ids, columns, coefficients
        self.rows = None if coefficients is None else coefficients.unbind(0)  # once, not in every layer
        self.sample_of, self.why_plain, self.certain = sample_of, why_plain, certain
        self.used = False

    def by_sample(self, k: Tensor) -> Tensor:
        """Return the Gram matrix (n, n) of the samples from that of the rows (N, N): sums over their rows."""
        if self.sample_of is None or self.ids is None:
            return k
        for _ in range(2):
            # Adds rows in a fixed order, which index_put_ does not on a CPU and index_add_ does not on CUDA.
            k = torch.ops.aten.embedding_dense_backward(
                k.mT.contiguous(), self.sample_of, len(self.ids), -1, False
            )
        return k

    def by_row(self, s: Tensor) -> Tensor:
        """Return the coefficients of the rows (N,) from those of the samples (n,)."""
        return s if self.sample_of is None else s[self.sample_of]
