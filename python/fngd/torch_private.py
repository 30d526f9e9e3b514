"""Every private name of torch that this package depends on, why, and what would replace it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable, forward_ad
from torch.compiler import is_exporting
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data.dataloader import _BaseDataLoaderIter

__all__ = [
    "BATCH_NORMS",
    "DROPOUTS",
    "NORMALISATIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "at_end_of_backward",
    "batches_received",
    "buffers_of",
    "computes_own_convolution",
    "convolution_without_bias",
    "current_graph_task",
    "has_gradient_hooks",
    "is_batched",
    "is_torchs_iterator",
    "output_padding",
    "padding_around",
    "parameters_of",
    "step_without_global_hooks",
    "taken_apart",
    "tree_flatten",
    "tree_unflatten",
    "unusual_context",
    "version",
]
# tree_flatten, tree_unflatten: how torch.func takes nested arguments apart; the package optree would do.

BATCH_NORMS: type[nn.Module] = nn.modules.batchnorm._BatchNorm
"""Common parent of BatchNorm1d-3d, SyncBatchNorm and what users derive from it."""

NORMALISATIONS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)
"""As BATCH_NORMS, with instance normalisation: `_NormBase` is the parent of both."""

TRANSPOSED_CONVOLUTIONS: type[nn.Module] = nn.modules.conv._ConvTransposeNd
"""Common parent of ConvTranspose1d-3d; the three public classes would do."""

_CONV_FORWARDS = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}

DROPOUTS: Any = nn.modules.dropout._DropoutNd
"""Common parent of all dropout modules; a tuple of the public classes would do."""


def current_graph_task() -> int:
    """Return the number of the backward that this thread runs, -1 outside of any.

    Several backwards may be under way at once (reentrant checkpoints, threads). Public torch has no name for
    one.
    """
    return torch._C._current_graph_task_id()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have the backward that runs now call `callback` when all its nodes are done, if none of them failed.

    DistributedDataParallel and FSDP end their backward the same way; public torch has hooks on tensors alone.
    """
    Variable._execution_engine.queue_callback(callback)


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Return whether hooks were put on a parameter by register_hook or register_post_accumulate_grad_hook.

    Public torch adds hooks and does not list them.
    """
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


# Looked up once: a routed call asks for each.
_transform_level, _tracing_state = torch._C._functorch.maybe_current_level, torch._C._get_tracing_state


@torch.compiler.assume_constant_result
def unusual_context() -> str:
    """Return in which context a call is made that nodes of the autograd engine do not serve, "" for none.

    torch.func transforms (vmap, grad, jvp, ...) and forward-mode differentiation compute what such nodes do
    not see, and a trace or an exported program is to hold torch's operators only. `torch.func` and forward
    mode offer no public test, and torch.jit's own is slower. torch.compile asks while it traces, and guards
    the answer itself.
    """
    if _transform_level() is not None:
        return "called inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "called inside forward-mode differentiation"
    if _tracing_state() is not None:
        return "traced by torch.jit"
    return "exported by torch.export" if is_exporting() else ""


def is_batched(t: Any) -> bool:
    """Return whether vmap batches a tensor: in a backward, several gradients at once (is_grads_batched).

    Public torch does not tell.
    """
    functorch = torch._C._functorch  # autograd.grad has a vmap of its own, an older one
    return isinstance(t, Tensor) and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))


def taken_apart(t: Any) -> tuple[list[Any], Callable[[list[Tensor]], Tensor]]:
    """Return the tensors that a batched one stands for, and what makes a batched one of such a list.

    autograd.grad's own vmap has no rules for many operators, so that gradients are computed one by one.
    """
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(t):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        whole = torch._remove_batch_dim(t, level, 1, 0)
        return list(whole.unbind(0)), lambda parts: torch._add_batch_dim(torch.stack(parts), 0, level)
    level = functorch.maybe_get_level(t)
    whole, dim = functorch._unwrap_batched(t, level)
    assert dim is not None  # it is batched
    return list(whole.unbind(dim)), lambda parts: functorch._add_batch_dim(torch.stack(parts), 0, level)


def version(t: Tensor) -> int:
    """Return how often a tensor was written to in place; autograd's own check uses the same counter."""
    return t._version


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary that a module keeps its parameters in.

    It is the only way to read what stands in a parameter's place without nn.Module's slower look-up, and to
    put another tensor there for one forward. torch.func.functional_call, public, copies every parameter.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary that a module keeps its buffers in, to put others there for a trial.

    The public torch.func.functional_call does not restore what a call replaces.
    """
    return module._buffers


def computes_own_convolution(module: nn.Module) -> bool:
    """Return whether a subclass of Conv1d-3d replaced the method that computes the convolution itself.

    Conv1d-3d call it from their public forward, so that a subclass may keep that and still differ.
    """
    return getattr(type(module), "_conv_forward", None) not in _CONV_FORWARDS


def convolution_without_bias(module: Any, x: Tensor) -> Tensor:
    """Return the convolution of a Conv1d-3d without its bias.

    The method that Conv1d-3d call from their public forward takes the bias as an argument, and knows every
    padding mode.
    """
    return module._conv_forward(x, module.weight, None)


def padding_around(module: Any) -> list[int]:
    """Return a convolution's padding as F.pad takes it: last dimension first, before and after.

    Convolutions compute it from `padding`, which may be a word; that would have to be done again.
    """
    return module._reversed_padding_repeated_twice


def output_padding(module: Any, x: Tensor, output_size: list[int] | None) -> list[int]:
    """Return the output padding by which a transposed convolution gives the output size that was asked for.

    Its public forward alone computes it, and hands it to no one.
    """
    sizes = (module.stride, module.padding, module.kernel_size, len(module.kernel_size), module.dilation)
    return module._output_padding(x, output_size, *sizes)


def is_torchs_iterator(batches: Iterator[Any]) -> bool:
    """Return whether DataLoader itself made an iterator over its batches; subclasses may return their own."""
    return isinstance(batches, _BaseDataLoaderIter)


def batches_received(batches: Iterator[Any]) -> int | None:
    """Return how many batches a DataLoader's iterator has taken from its workers, None without workers.

    Batches that a worker failed on are counted. Public torch does not number what it yields.
    """
    return getattr(batches, "_rcvd_idx", None)


_HOOKED = Optimizer.profile_hook_step(Optimizer.step).__code__  # type: ignore[attr-defined]


def step_without_global_hooks(optimizer: Optimizer) -> None:
    """Make a step of an optimizer inside another one's, which torch's hooks for all optimizers hear already.

    torch puts a function around every class's step that calls those hooks and the optimizer's own, and offers
    no step without it. The optimizer's own hooks are called here.
    """
    step: Any = optimizer.step
    if getattr(getattr(step, "__func__", None), "__code__", None) is not _HOOKED:
        step()
        return
    args: tuple[Any, ...] = (optimizer,)
    kwargs: dict[str, Any] = {}
    for before in optimizer._optimizer_step_pre_hooks.values():
        args, kwargs = before(optimizer, args, kwargs) or (args, kwargs)
    step.__wrapped__(*args, **kwargs)
    for after in optimizer._optimizer_step_post_hooks.values():
        after(optimizer, args, kwargs)
