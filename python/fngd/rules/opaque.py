"""Modules of any kind, seen from outside: which tensors have a row per sample, and whether rows mix."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

ROWS = 2**29
"""Bytes of per-sample gradients held at a time; what does not fit is computed anew for pairs of chunks."""


class Opaque:
    """A module of any kind with all its parameters, and what its first training call showed."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.vectorized = True
        self._reason: str | None = None  # against the module, "" for none, None before it is known

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters, those of its parametrizations included."""
        return list(self.owner.parameters())

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameter that stands for all when it is asked whether the module trains."""
        parameters = self.parameters
        return {"weight": next((p for p in parameters if p.requires_grad), parameters[0])}

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self.owner.training

    def forward(self, x: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module computes by itself."""
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def samples_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the first tensor of a call with its samples in dimension 0, None where it has none."""
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not tensors or (isinstance(self.owner, nn.RNNBase) and tensors[0].ndim != 3):
            return None
        dim = _sample_dim(self.owner, 0)
        return tensors[0].transpose(0, dim) if tensors[0].ndim > dim else None

    def reason_against_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return why a call must keep the plain gradient, "" for a call that need not."""
        if self._reason is None:
            try:
                with torch.autograd.graph.disable_saved_tensors_hooks("saved"):
                    self._reason = self._tried(Call(self, args, kwargs))
            except RuntimeError:
                return "called where saved tensors are hooked, as in checkpointing"
        return self._reason

    def _tried(self, call: "Call") -> str:
        """Run a call on copies, as one batch and sample by sample, and compare outputs and gradients."""
        name = type(self.owner).__name__
        tensors = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in call.tensors]
        devices = [t.device for t in tensors if t.is_cuda]
        with torch.random.fork_rng(devices), torch.enable_grad():
            before = _random_states(devices)
            try:
                parameters = call.trained()
                inputs = [t.clone() for t in tensors]  # which the module may overwrite
                y = call.flat_output(parameters, inputs)
                if not all(map(torch.equal, before, _random_states(devices))):
                    return f"{name} draws random numbers"
                if any(t._version for t in inputs):
                    return f"{name} modifies its input"
                if not _leaves(y) <= {id(t) for t in (*parameters.values(), *tensors)}:
                    return f"{name} depends on tensors that are not its arguments"
                e = torch.randn(y.shape, dtype=y.dtype).to(y.device)
                expected = torch.autograd.grad(
                    (y * e).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
                )
                size, found, outputs = self._first_rows(call, e)
            except Exception as error:  # whatever a module of any kind may raise
                return f"{name} cannot be run sample by sample ({type(error).__name__}: {error!s:.80})"
        tolerance = torch.finfo(y.dtype).eps ** 0.5
        total = torch.cat([g.flatten() for g in expected])
        if not (found - total).norm() <= tolerance * size:
            return f"{name} couples samples: its gradient is no sum over samples"
        if not (outputs - y).norm() <= tolerance * y.norm():
            return f"{name} couples samples"
        return ""

    def _first_rows(self, call: "Call", e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the norm of the per-sample gradients (N, P), their sum (P,), and the outputs (N, D)."""
        try:
            self.rows(call, e[:1])
        except Exception:  # an operator that vmap has no rule for
            self.vectorized = False
        norms, sums, outputs = [], [], []
        for samples in self.chunks(call.samples):
            rows, y = self.rows(call, e[samples], samples.start)
            norms.append(rows.norm())
            sums.append(rows.sum(0))
            outputs.append(y)
        return torch.stack(norms).norm(), torch.stack(sums).sum(0), torch.cat(outputs)

    def chunks(self, samples: int) -> list[slice]:
        """Return the samples in chunks, two of whose gradients take no more than ROWS bytes."""
        row = sum(p.nbytes for p in self.parameters if p.requires_grad)
        step = max(1, ROWS // (2 * row))
        return [slice(begin, min(begin + step, samples)) for begin in range(0, samples, step)]

    def rows(self, call: "Call", e: Tensor, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Return the gradients (M, P) of M samples for e (M, D) at the outputs, and the outputs (M, D).

        begin: the first of these samples
        """
        parameters = call.trained()

        def weighted(parameters: Mapping[str, Tensor], e: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            batch = [t.unsqueeze(d) for t, d in zip(tensors, call.dims, strict=True)]
            y = call.flat_output(parameters, batch)[0]
            return (y * e).sum(), y

        each = grad(weighted, has_aux=True)
        tensors = [t.detach().narrow(d, begin, len(e)) for t, d in zip(call.tensors, call.dims, strict=True)]
        # Vendor libraries' recurrent layers have no batching rule; other operators without one run in a loop.
        with _without_vendor_libraries():
            if self.vectorized:
                # Expanded, because in-place operators inside need every operand to be batched.
                copies = {name: p.expand(len(e), *p.shape) for name, p in parameters.items()}
                gradients, outputs = vmap(each, (0, 0, *call.dims))(copies, e, *tensors)
            else:
                found = [
                    each(parameters, e[n], *(t.select(d, n) for t, d in zip(tensors, call.dims, strict=True)))
                    for n in range(len(e))
                ]
                gradients = {name: torch.stack([g[name] for g, _ in found]) for name in parameters}
                outputs = torch.stack([y for _, y in found])
        return torch.cat([g.flatten(1) for g in gradients.values()], 1), outputs


class Call:
    """One call of a module, its arguments taken apart: tensors with a row per sample, and the rest.

    tensors: those with a row per sample; dims: the dimension of each that counts them
    """

    def __init__(self, module: Opaque, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.owner = module.owner
        self._leaves, self._spec = tree_flatten((args, kwargs))
        order = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.samples = self._leaves[order[0]].shape[_sample_dim(self.owner, 0)]
        self._places: list[int] = []
        self.dims: list[int] = []
        for position, i in enumerate(order):
            dim, leaf = _sample_dim(self.owner, position), self._leaves[i]
            if leaf.ndim > dim and leaf.shape[dim] == self.samples:
                self._places.append(i)
                self.dims.append(dim)
        self.tensors: list[Tensor] = [self._leaves[i] for i in self._places]
        device = self.tensors[0].device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

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

    def run(self, state: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Any:
        """Return the module's output for other tensors, and other parameters and buffers where given."""
        named = {f"owner.{name}": t for name, t in state.items()}
        return functional_call(_OwnForward(self.owner), named, *self.arguments(tensors))

    def flat_output(self, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """Return all outputs side by side, (N, D); the module's buffers stay as they are."""
        device, dtype, enabled = self._autocast
        buffers = {name: b.clone() for name, b in self.owner.named_buffers()}
        with torch.autocast(device, dtype, enabled):
            outputs = self.run({**parameters, **buffers}, tensors)
        samples = tensors[0].shape[self.dims[0]]
        return torch.cat([t.transpose(0, d).reshape(samples, -1) for t, d in self.outputs(outputs)], 1)

    def outputs(self, result: Any) -> list[tuple[Tensor, int]]:
        """Return the differentiable tensors of a result and the dimension of each that counts samples."""
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        places = [(t, _sample_dim(self.owner, i)) for i, t in enumerate(tensors)]
        return [(t, dim) for t, dim in places if t.is_floating_point()]


class _OwnForward(nn.Module):
    """A module's own forward, whatever was set on the instance."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.owner).forward(self.owner, *args, **kwargs)


@contextmanager
def _without_vendor_libraries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about speed, and about devices that are not there
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            yield


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _sample_dim(module: nn.Module, position: int) -> int:
    """Return the dimension that counts samples in a tensor of a call or result."""
    if not isinstance(module, nn.RNNBase):
        return 0
    return 0 if module.batch_first and position == 0 else 1  # hidden states have layers first


def _leaves(y: Tensor) -> set[int]:
    """Return the ids of the leaf tensors that y depends on."""
    seen, stack, found = set(), [y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [function for function, _ in node.next_functions]
    return found
