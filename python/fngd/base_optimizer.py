"""The optimizer under FNGD, whose rule updates the parameters: which can serve, and how it is made."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, SupportsFloat

import torch
from torch import nn
from torch.optim import Optimizer

_BASES: dict[str, type[Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
_NAMES = ", ".join(map(repr, _BASES))
_FUSED_ON_CUDA = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_SGD_LR = 0.1


def base_class(base: str | type[Optimizer]) -> type[Optimizer]:
    """Return the torch.optim class that the argument `base` of FNGD names.

    Raises:
        TypeError: What is no optimizer.
        ValueError: A name or an optimizer that cannot serve.
    """
    if isinstance(base, str):
        if base not in _BASES:
            raise ValueError(
                f"base: expected one of {_NAMES} or any torch.optim class, as base=torch.optim.Adam; "
                f"got {base!r}"
            )
        return _BASES[base]
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        got = base if isinstance(base, type) else f"an instance of {type(base).__name__}"
        raise TypeError(
            f"base: expected {_NAMES} or a torch.optim class, whose options go to FNGD; got {got}"
        )
    wanted = _required(base.__init__)
    # A wrapper often has its groups and its state from the optimizer that it holds.
    if wanted & {"optimizer", "base_optimizer"} or hasattr(base, "param_groups") or hasattr(base, "state"):
        raise _is_a_wrapper(base)
    if "model" in wanted:
        raise ValueError(f"base: {base.__name__} takes a model, expected an optimizer of parameters")
    if needed := sorted(_required(base.step)):
        raise ValueError(
            f"base: {base.__name__}.step() needs {', '.join(needed)}, expected a rule that takes gradients "
            "alone, because FNGD evaluates the loss once a step"
        )
    return base


def make_base(
    rule: type[Optimizer],
    params: Iterable[Any],
    lr: SupportsFloat | None,
    options: dict[str, Any],
    others: Collection[str],
) -> Optimizer:
    """Return an optimizer of a class that `base_class` let through.

    Args:
        rule: The class.
        params: Parameters or groups.
        lr: Its learning rate; None for 0.1 with SGD, and for the default of any other class.
        options: Its further options.
        others: The options of FNGD itself, which a misspelt one may have meant.

    Raises:
        TypeError: An option that it does not know or cannot take.
        ValueError: An option out of range; a class that holds another optimizer.
    """
    if lr is None and rule is torch.optim.SGD:
        lr = _SGD_LR
    if lr is not None:
        options = {"lr": lr, **options}
    accepted = inspect.signature(rule).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for name in options:
            if name not in accepted:
                raise TypeError(_unknown(name, rule, [*accepted][1:], others))
    try:
        made = rule(params, **options)
    except TypeError as error:
        raise TypeError(f"options of base {rule.__name__}: {error}") from error
    held = (value for each in vars(made).values() for value in (each if isinstance(each, list) else [each]))
    if any(isinstance(value, Optimizer) for value in held):
        raise _is_a_wrapper(rule)
    return made


def fuses_on_cuda(base: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> bool:
    """Return whether torch's fused update can be chosen for a user who named no other."""
    return (
        base in _FUSED_ON_CUDA
        and not options.keys() & {"fused", "foreach", "capturable", "differentiable"}
        and all(p.is_cuda and p.is_floating_point() for p in model.parameters())
        and not any(getattr(module, "sparse", False) for module in model.modules())
    )


def _required(function: Callable[..., Any]) -> set[str]:
    """Return the names of a method's arguments that have no default."""
    _, *arguments = inspect.signature(function).parameters.values()  # self
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {a.name for a in arguments if a.default is a.empty and a.kind not in variadic}


def _is_a_wrapper(base: type[Optimizer]) -> ValueError:
    return ValueError(
        f"base: {base.__name__} works around another optimizer, expected one that updates parameters itself; "
        f"make {base.__name__} around FNGD instead (docs/training-loops.md, Wrappers)"
    )


def _unknown(name: str, rule: type[Optimizer], accepted: Collection[str], others: Collection[str]) -> str:
    alike = [
        f"{match!r} of {owner}"
        for owner, names in (("FNGD", others), (rule.__name__, accepted))
        for match in difflib.get_close_matches(name, names, 1, 0.8)
    ]
    advice = f"did you mean {' or '.join(alike)}?" if alike else f"it takes {', '.join(accepted)}"
    return f"options of base {rule.__name__}: neither it nor FNGD knows {name!r}; {advice}"
