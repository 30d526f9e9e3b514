"""What a state_dict must hold before any of it is loaded; optimizers that cannot be copied without one."""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer


def check_groups(state_dict: Any, optimizer: Optimizer) -> None:
    """Raise TypeError for what is no dictionary, ValueError for what is no optimizer's state."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a dictionary, got {type(state_dict).__name__}")
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state_dict.get("state"), Mapping):
        found = ", ".join(map(str, list(state_dict)[:5]))
        raise ValueError(f"state_dict: expected the keys 'state' and 'param_groups', got {found or 'none'}")
    needed = {"params", *optimizer.defaults}
    for number, group in enumerate(groups):
        missing = needed - set(group) if isinstance(group, Mapping) else needed
        if missing:
            raise ValueError(
                f"state_dict: expected {', '.join(sorted(missing))} in param_groups[{number}], missing there"
            )


class NotCopied(Optimizer):
    """An optimizer that knows the modules of one model: a copy would serve that model, not a copy of it."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copy.copy, copy.deepcopy and pickle."""
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be copied or pickled, because it belongs to its model: make a new {name} for a "
            "copy of the model, and load copy.deepcopy(optimizer.state_dict()) into it"
        )


def check_like(state: Any, expected: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless state has the keys of expected, with values of the same kinds.

    Tensors are of one dtype and number of dimensions; None stands for a number that is not known.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict: expected a dictionary under {name!r}, got {type(state).__name__}")
    for key, like in expected.items():
        if key not in state:
            raise ValueError(f"state_dict: expected the key {key!r} under {name!r}, it is missing")
        if _kind(state[key]) != _kind(like) and not {_kind(state[key]), _kind(like)} == {"int", "NoneType"}:
            raise ValueError(
                f"state_dict: expected {_kind(like)} as {key!r} under {name!r}, got {_kind(state[key])}"
            )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with {value.ndim} dimensions"
    return type(value).__name__
