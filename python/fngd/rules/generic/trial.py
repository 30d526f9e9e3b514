"""Tries a call of a module of any kind on copies: whether output rows depend on their input rows alone."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_private import buffers_of, version
from .call import Call, gradients_by
from .module import GenericModule

TF32_EPS = 2.0**-10


def reason_against_call(module: GenericModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why a call must keep the plain gradient, "" if it need not; each kind is tried once."""
    call = Call(module.owner, args, kwargs)
    for kind, reason in module.tried:
        if kind == call.kind:
            return reason
    if call.samples == 1:
        return "a batch of one sample does not show whether its rows mix"
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("saved"):
            reason = _try(module, call)
    except RuntimeError:
        return "called where saved tensors are hooked, as in checkpointing"
    module.tried.append((call.kind, reason))
    return reason


def _try(module: GenericModule, call: Call) -> str:
    """Return why a call must keep the plain gradient, "" for none; all that it changes is put back.

    The batch as a whole and its samples one by one must have the same outputs, and the same gradient for
    random coefficients of the samples: what happens to it in a step.
    """
    name = type(module.owner).__name__
    devices = [t.device for t in call.tensors if t.is_cuda]
    with torch.random.fork_rng(devices), torch.enable_grad(), _put_back(module.owner) as held:
        call.tell_samples_apart()
        tensors = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in call.tensors]
        before, drawn = _random_states(devices), random.getstate()
        try:
            parameters = call.trained()
            inputs = [t.clone() for t in tensors]  # which the module may overwrite
            y = call.flat_output(parameters, inputs)
            if not all(map(torch.equal, before, _random_states(devices))) or random.getstate() != drawn:
                return f"{name} draws random numbers"
            if any(version(t) for t in inputs):
                return f"{name} modifies its input"
            if any(_changed(*each) for each in held):
                return f"{name} keeps a state from call to call"
            if not _leaves(y) <= {id(t) for t in (*parameters.values(), *tensors)}:
                return f"{name} depends on tensors that are not its arguments"
            e = torch.randn(y.shape, dtype=y.dtype, device="cpu").to(y.device)
            s = (torch.rand(len(y), dtype=y.dtype, device="cpu") + 0.5).to(y.device)
            expected = torch.cat([g.flatten() for g in gradients_by(parameters, y, e * s.unsqueeze(1))])
            size, found, outputs = _by_sample(module, call, e, s)
        except Exception as error:  # whatever a module of any kind may raise
            return f"{name} cannot be run sample by sample ({type(error).__name__}: {error!s:.80})"
    # On a GPU float32 may be multiplied as TF32, of 10 bits, by default in convolutions and recurrent layers.
    tf32 = y.is_cuda and y.dtype == torch.float32
    tolerance = (TF32_EPS if tf32 else torch.finfo(y.dtype).eps) ** 0.5
    if not (found - expected).norm() <= tolerance * size:
        return f"{name} couples samples: its gradient is no sum over samples"
    if not (outputs - y).norm() <= tolerance * y.norm():
        return f"{name} couples samples"
    return ""


def _by_sample(module: GenericModule, call: Call, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of the per-sample gradients (N, P), their sum weighted by s, the outputs (N, D)."""
    try:
        module.per_sample_gradients(call, e[:1])
    except Exception:  # an operator that torch.func has no rule for
        module.vectorized = False
    norms, sums, outputs = [], [], []
    for samples in module.chunks(call.samples):
        rows, y = module.per_sample_gradients(call, e[samples], samples.start)
        norms.append(rows.norm())
        sums.append(s[samples].to(rows.dtype) @ rows)
        outputs.append(y)
    return torch.stack(norms).norm(), torch.stack(sums).sum(0), torch.cat(outputs)


Held = tuple[dict[str, Any], dict[str, Any]]
"""A dictionary of a module, and what it held when the trial began."""


@contextmanager
def _put_back(owner: nn.Module) -> Iterator[list[Held]]:
    """Let a module use copies of its tensors; put back all that it held, and random's state."""
    drawn = random.getstate()
    before = [(buffers_of(module), dict(buffers_of(module))) for module in owner.modules()]
    # torch's recurrent layers renew their lists of weights whenever a weight is replaced.
    others = [module for module in owner.modules() if type(module).__module__ != nn.RNNBase.__module__]
    before += [(vars(module), dict(vars(module))) for module in others]
    for held, values in before:
        held.update({key: value.clone() for key, value in values.items() if isinstance(value, Tensor)})
    try:
        yield [(held, dict(held)) for held, _ in before]
    finally:
        for held, values in before:
            held.clear()
            held.update(values)
        random.setstate(drawn)


def _changed(held: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether something was replaced, added or removed, or a copied tensor was written to."""
    return held.keys() != before.keys() or any(
        held[key] is not value or (isinstance(value, Tensor) and version(value) > 0)
        for key, value in before.items()
    )


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


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
