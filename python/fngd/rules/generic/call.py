"""One call of a module of any kind, seen from outside: which tensors have a row per sample."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...routed_class import own_forward
from ...torch_private import tree_flatten, tree_unflatten


class Call:
    """One call of a module, its arguments taken apart: tensors with a row per sample, and the rest.

    Attributes:
        tensors: Those with a row per sample.
        dims: The dimension of each that counts the samples.
    """

    def __init__(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.owner = owner
        self._leaves, self._spec = tree_flatten((args, kwargs))
        order = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.samples = self._leaves[order[0]].shape[sample_dim(self.owner, 0)]
        self._places: list[int] = []
        self.dims: list[int] = []
        for position, i in enumerate(order):
            dim, leaf = sample_dim(self.owner, position), self._leaves[i]
            if leaf.ndim > dim and leaf.shape[dim] == self.samples:
                self._places.append(i)
                self.dims.append(dim)
        self.tensors: list[Tensor] = [self._leaves[i] for i in self._places]
        device = self.tensors[0].device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @property
    def kind(self) -> Any:
        """What one verdict holds for: all but the values and sizes of tensors and the values of numbers."""
        kinds = [
            (leaf.ndim, i in self._places or leaf.requires_grad, i in self._places)
            if isinstance(leaf, Tensor)
            else leaf
            if leaf is None or isinstance(leaf, (bool, str))
            else type(leaf)
            for i, leaf in enumerate(self._leaves)
        ]
        return self._spec, kinds

    def tell_samples_apart(self) -> None:
        """Add noise to samples that are all the same, as they are behind a layer that begins with zeros."""
        pairs = zip(self.tensors, self.dims, strict=True)
        if all(bool((t == t.narrow(dim, 0, 1)).all()) for t, dim in pairs):
            noise = partial(torch.randn, dtype=torch.float32, device="cpu")
            self.tensors = [t + noise(t.shape).to(t) if t.is_floating_point() else t for t in self.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors with a row per sample."""
        return sum(t.nbytes for t in self.tensors)

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters to differentiate by, detached from the module, by name."""
        named = self.owner.named_parameters()
        return {name: p.detach().requires_grad_() for name, p in named if p.requires_grad}

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other tensors in the places of those with a row per sample."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._spec)

    def run(self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Any:
        """Return the module's output for other tensors and parameters."""
        named = {f"owner.{name}": p for name, p in parameters.items()}
        return functional_call(_OwnForward(self.owner), named, *self.arguments(tensors))

    def flat_output(self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """Return all outputs side by side, (N, D)."""
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype, enabled):
            outputs = self.run(parameters, tensors)
        samples = tensors[0].shape[self.dims[0]]
        return torch.cat([t.transpose(0, d).reshape(samples, -1) for t, d in self.outputs(outputs)], 1)

    def outputs(self, result: Any) -> list[tuple[Tensor, int]]:
        """Return the differentiable tensors of a result and the dimension of each that counts samples."""
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        places = [(t, sample_dim(self.owner, i)) for i, t in enumerate(tensors)]
        return [(t, dim) for t, dim in places if t.is_floating_point()]


class _OwnForward(nn.Module):
    """A module's own forward, whatever was set on the instance and whoever takes its calls."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return own_forward(self.owner)(self.owner, *args, **kwargs)


def gradients_by(parameters: Mapping[str, Tensor], y: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """Return the gradient of <y, e> by each parameter, zeros for one that takes no part."""
    return torch.autograd.grad(y, list(parameters.values()), e, allow_unused=True, materialize_grads=True)


def sample_dim(module: nn.Module, position: int) -> int:
    """Return the dimension that counts samples in a tensor of a call or result."""
    if not isinstance(module, nn.RNNBase):
        return 0
    return 0 if module.batch_first and position == 0 else 1  # hidden states have layers first
