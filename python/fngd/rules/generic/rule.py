"""Modules of any kind whose samples do not mix: C_n by torch.func, later a scaling of grad_output."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import UseHandler
from fngd_kernels.ops.sketch import sketched
from fngd_kernels.sketch import ROWS

from ...routed_class import own_forward
from ...torch_private import DROPOUTS, current_graph_task, is_batched, tree_flatten, tree_unflatten, version
from ..base import Rule, Use
from .call import Call, gradients_by
from .module import GenericModule

LEAST = 1e-3
"""Least |s| in units of the largest: by 1 / s gradients are scaled back at the module's input."""


class GenericRule(Rule):
    """A module whose parameters are all its own, and whose output rows depend on the same input rows alone.

    Solving forms the per-sample gradients (N, P) of one module at a time, in chunks under a bound. With
    weights given, nothing but the module's ordinary backward runs, between a gradient scaled by s at its
    output and by 1 / s at its input.
    """

    name = "generic"

    def reason_against(self, module: nn.Module) -> str | None:
        kind, parameters = type(module).__name__, list(module.parameters())
        children = [child for name, child in module.named_children() if name != "parametrizations"]
        if any(True for child in children for _ in child.parameters()):
            return f"no rule for {kind}"
        if own_forward(module) is nn.Module.forward or isinstance(module, torch.jit.ScriptModule):
            return f"no rule for {kind}"
        if any(not p.is_floating_point() or p.dtype != parameters[0].dtype for p in parameters):
            return f"{kind} has parameters that are not all real, of one type"
        if getattr(module, "sparse", False) or getattr(module, "max_norm", None) is not None:
            return f"{kind} with sparse gradients or max_norm"
        if is_parametrized(module) and any(True for _ in module.parametrizations.buffers()):  # type: ignore[union-attr]
            return f"{kind} with a parametrization that has a state"
        if (isinstance(module, nn.RNNBase) and module.dropout > 0) or any(
            isinstance(child, DROPOUTS) and child.p > 0 for child in module.modules()
        ):
            return f"{kind} with dropout inside"
        return None

    def batched(self, module: GenericModule, x: Tensor) -> bool:
        return x.ndim >= 1

    def forward(
        self,
        module: GenericModule,
        x: Tensor,
        coefficients: Tensor | None,
        on_use: UseHandler | None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        call = Call(module.owner, args, kwargs or {})
        # Views, so that a hook on them is on nothing else.
        tensors = [t.view_as(t) for t in call.tensors]
        if on_use is not None:
            return _captured(module, call, tensors, on_use)
        assert coefficients is not None
        s = _away_from_zero(coefficients)
        for t, dim in zip(tensors, call.dims, strict=True):
            _hook(t, partial(_divided, _along(s, t, dim)))
        args, kwargs = call.arguments(tensors)
        result = _unaliased(call, module.forward(x, args, kwargs), tensors)
        for t, dim in call.outputs(result):
            _hook(t, partial(_scaled, _along(s, t, dim)))
        return result

    def gram(self, module: GenericModule, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        samples = len(uses[0].e)
        chunks = module.chunks(samples)
        if sketch is not None:
            parts = [sketched(_contributions(module, uses, some), ROWS, sketch) for some in chunks]
            return fk.gram_rows(torch.cat(parts))
        if len(chunks) == 1:
            return fk.gram_rows(_contributions(module, uses, chunks[0]))
        dtype = torch.promote_types(module.parameters[0].dtype, torch.float32)
        k = uses[0].e.new_empty((samples, samples), dtype=dtype)
        for i, some in enumerate(chunks):
            rows = _contributions(module, uses, some)
            k[some, some] = fk.gram_rows(rows)
            for others in chunks[i + 1 :]:
                k[some, others] = rows.to(dtype) @ _contributions(module, uses, others).to(dtype).T
                k[others, some] = k[some, others].T
        return k

    def contributions(self, module: GenericModule, uses: Sequence[Use]) -> tuple[Tensor | None, ...]:
        return _split(module, _contributions(module, uses, slice(0, len(uses[0].e))))

    def combine(self, module: GenericModule, uses: Sequence[Use], s: Tensor) -> tuple[Tensor | None, ...]:
        total: list[Tensor] = []
        for use in uses:
            with torch.enable_grad():
                parameters = use.a.trained()
                y = use.a.flat_output(parameters, [t.detach() for t in use.a.tensors])
                gradients = gradients_by(parameters, y, (use.e * s.unsqueeze(1)).to(y.dtype))
            total.append(torch.cat([g.flatten() for g in gradients]))
        return _split(module, torch.stack(total).sum(0))


def _contributions(module: GenericModule, uses: Sequence[Use], samples: slice) -> Tensor:
    """Return the contributions (M, P) of some samples, summed over the uses."""
    rows = [module.per_sample_gradients(use.a, use.e[samples], samples.start)[0] for use in uses]
    return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)


def _split(module: GenericModule, flat: Tensor) -> tuple[Tensor | None, ...]:
    """Return flat (..., P) as one (..., *shape) for each parameter, None for a frozen one."""
    trained = [p for p in module.parameters if p.requires_grad]
    parts = iter(flat.split([p.numel() for p in trained], -1))
    leading = flat.shape[:-1]
    return tuple(next(parts).view(*leading, *p.shape) if p.requires_grad else None for p in module.parameters)


def _away_from_zero(s: Tensor) -> Tensor:
    """Return s with |s| of at least LEAST times the largest, signs kept; 1 where all are 0."""
    largest = s.abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    return s.abs().clamp(min=LEAST * largest).copysign(s)


def _along(s: Tensor, t: Tensor, dim: int) -> Tensor:
    """Return s (N,) in a shape that multiplies dimension dim of t."""
    return s.view([-1 if d == dim else 1 for d in range(t.ndim)])


def _scaled(s: Tensor, gradient: Tensor) -> Tensor:
    return (gradient * s).to(gradient.dtype)


def _divided(s: Tensor, gradient: Tensor) -> Tensor:
    return (gradient / s).to(gradient.dtype)


def _unaliased(call: Call, result: Any, tensors: Sequence[Tensor]) -> Any:
    """Clone outputs that may alias an input or another output.

    Hooks on them then see only the gradients from outside the module. Not views, which may be written to.
    """
    outputs = [t for t, _ in call.outputs(result)]
    if len(outputs) == 1 and all(outputs[0] is not t for t in tensors):
        return result
    leaves, spec = tree_flatten(result)
    return tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in leaves], spec)


def _hook(t: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    if t.requires_grad:
        t.register_hook(hook)


class _GradOutputs:
    """The gradients that arrive at a module's outputs in one backward."""

    def __init__(self) -> None:
        self.task = -1
        self.arrived: dict[int, Tensor] = {}
        self.differentiable = False  # whether one of them was to be differentiated again

    def note(self, index: int, gradient: Tensor) -> None:
        self.differentiable |= torch.is_grad_enabled()
        task = current_graph_task()
        if task != self.task:
            self.task, self.arrived = task, {}
        # autograd.grad's own vmap, of several gradients at once, has no rule for detach.
        self.arrived[index] = gradient if is_batched(gradient) else gradient.detach()


def _captured(module: GenericModule, call: Call, tensors: Sequence[Tensor], on_use: UseHandler) -> Any:
    """Return the module's output; the handler's gradients take the place of its parameters' ordinary ones.

    The parameters enter as one vector through a node, which hears when all of it has arrived.
    """
    trained = {name: p for name, p in module.owner.named_parameters() if p.requires_grad}
    grad_outputs = _GradOutputs()
    versions = [version(t) for t in call.tensors]
    sizes: list[tuple[torch.Size, int, torch.dtype]] = []

    def answer(_: Any, ordinary: Tensor, __: bool, must_return: bool) -> Any:
        if grad_outputs.differentiable:
            module.refuse(call, "its gradient is differentiated again")
            return ordinary[0], None
        if is_batched(ordinary):
            module.refuse(call, "its gradients were asked for in a batch")
            return ordinary[0], None
        if [version(t) for t in call.tensors] != versions:
            module.refuse(call, "its input is written to after the call")
            return ordinary[0], None
        samples, dtype = call.samples, ordinary.dtype
        e = torch.cat(
            [
                grad_outputs.arrived[i].transpose(0, dim).reshape(samples, -1)
                if i in grad_outputs.arrived
                else ordinary.new_zeros(samples, math.prod(shape) // samples, dtype=dtype)
                for i, (shape, dim, dtype) in enumerate(sizes)
            ],
            1,
        )
        grad_outputs.arrived = {}
        gradients = on_use(call, e, True, must_return)
        if gradients is None:
            return None
        return torch.cat([g.flatten() for g in gradients if g is not None]).to(dtype), None

    vector = torch.cat([p.flatten() for p in trained.values()])
    gated = nodes.rows(vector, 1, None, answer)[0].split([p.numel() for p in trained.values()])
    parameters = {name: g.view_as(p) for (name, p), g in zip(trained.items(), gated, strict=True)}
    result = _unaliased(call, call.run(parameters, tensors), tensors)
    for index, (t, dim) in enumerate(call.outputs(result)):
        sizes.append((t.shape, dim, t.dtype))
        _hook(t, partial(grad_outputs.note, index))
    return result
