"""Modules of any kind, seen from outside: their parameters and per-sample gradients."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from ...routed_class import own_forward
from ...torch_private import tree_flatten
from .call import Call, gradients_by, sample_dim

PER_SAMPLE_GRAD_BYTES = 2**29
"""Bytes of per-sample gradients held at a time; what does not fit is computed anew for pairs of chunks."""


class GenericModule:
    """A module of any kind with all its parameters, and what trials of its calls have shown."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.vectorized = True
        # Kinds of calls that were tried, each with why it must keep the plain gradient, "" if it need not.
        self.tried: list[tuple[Any, str]] = []
        self.refused = ""  # why the last call was refused whose gradient had come already

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters, those of its parametrizations included."""
        return list(self.owner.parameters())

    def forward(self, x: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module computes by itself."""
        return own_forward(self.owner)(self.owner, *args, **kwargs)

    def samples_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the first tensor of a call with its samples in dimension 0, None where it has none.

        One that is nested or sparse is returned as it is.
        """
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        for t in tensors:
            if t.is_nested or t.layout is not torch.strided:
                return t
        if not tensors or (isinstance(self.owner, nn.RNNBase) and tensors[0].ndim != 3):
            return None
        dim = sample_dim(self.owner, 0)
        return tensors[0].transpose(0, dim) if tensors[0].ndim > dim else None

    def refuse(self, call: Call, reason: str) -> None:
        """Keep the plain gradient for this call, and for those of its kind from now on."""
        self.refused = reason
        self.tried.insert(0, (call.kind, reason))

    def chunks(self, samples: int) -> list[slice]:
        """Return the samples in chunks, two of whose gradients take no more than PER_SAMPLE_GRAD_BYTES."""
        row = sum(p.nbytes for p in self.parameters if p.requires_grad)
        step = max(1, PER_SAMPLE_GRAD_BYTES // (2 * row))
        return [slice(begin, min(begin + step, samples)) for begin in range(0, samples, step)]

    def per_sample_gradients(self, call: Call, e: Tensor, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Return the gradients (M, P) of M samples for e (M, D) at the outputs, and the outputs (M, D).

        Args:
            begin: The first of these samples.
        """
        parameters = call.trained()
        tensors = [t.detach().narrow(d, begin, len(e)) for t, d in zip(call.tensors, call.dims, strict=True)]
        # Vendor libraries' recurrent layers have no batching rule.
        with _without_vendor_libraries():
            run = _vectorized if self.vectorized else _one_by_one
            gradients, outputs = run(call, parameters, e, tensors)
        return torch.cat([g.flatten(1) for g in gradients], 1), outputs


def _vectorized(
    call: Call, parameters: dict[str, Tensor], e: Tensor, tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor]:
    """Return the gradients (M, *shape) to each parameter, and the outputs (M, D), of M samples by vmap."""

    def weighted(parameters: Mapping[str, Tensor], e: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        batch = [t.unsqueeze(d) for t, d in zip(tensors, call.dims, strict=True)]
        y = call.flat_output(parameters, batch)[0]
        return (y * e).sum(), y

    # Expanded, because in-place operators inside need every operand to be batched.
    copies = {name: p.expand(len(e), *p.shape) for name, p in parameters.items()}
    gradients, outputs = vmap(grad(weighted, has_aux=True), (0, 0, *call.dims))(copies, e, *tensors)
    return list(gradients.values()), outputs


def _one_by_one(
    call: Call, parameters: dict[str, Tensor], e: Tensor, tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor]:
    """Return the same for modules that torch.func does not know how to vectorize, or to differentiate."""
    gradients, outputs = [], []
    for n in range(len(e)):
        with torch.enable_grad():
            y = call.flat_output(
                parameters, [t.narrow(d, n, 1) for t, d in zip(tensors, call.dims, strict=True)]
            )
        outputs.append(y.detach())
        gradients.append(gradients_by(parameters, y, e[n : n + 1]))
    return [torch.stack(column) for column in zip(*gradients, strict=True)], torch.cat(outputs)


@contextmanager
def _without_vendor_libraries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about speed, and about devices that are not there
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            yield
