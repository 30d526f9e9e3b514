"""Every private name of torch that this package depends on, why, and what would replace it."""

from typing import Any

import torch
from torch import Tensor

HAS_ONEDNN_PRODUCT = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether `onednn_rows_product` can be called."""

HAS_ONEDNN_BFLOAT16: bool = (
    hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether oneDNN computes bfloat16 convolutions on this processor.

Where it does not, torch sums them in bfloat16. Public torch tells only whether oneDNN is there.
"""


def onednn_rows_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y^T for x (M,D) and y (N,D) by oneDNN.

    torch's own product of float32 uses MKL, which has half of oneDNN's speed on CPUs that are not Intel's; no
    public function chooses between them.
    """
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def will_execute(node: Any) -> bool:
    """Return whether the backward that runs now needs the gradient that a node of the graph computes.

    Nodes in C++ ask `task_should_compute_output`; in Python, public torch tells only what was decided in the
    forward (`ctx.needs_input_grad`).
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # It is a leaf for which autograd.grad was called.
        return True
