"""Finds the modules of a model that rules serve; those that share a weight are one block of parameters."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..rules import GenericRule, rule_for
from ..torch_private import NORMALISATIONS, parameters_of
from .block import ParameterBlock, RoutedModule
from .routing import is_replaced

SKIPPED = "skipped"
NORMALISATION = 'normalisation (norms="plain")'
USER_REASONS = (SKIPPED, NORMALISATION)
"""Reasons for the plain gradient that the user gave."""


def find_blocks(
    model: nn.Module,
    parameters: Iterable[Tensor],
    *,
    affine: bool,
    skip: Sequence[str] = (),
    composite: bool = True,
) -> tuple[list[ParameterBlock], dict[str, str]]:
    """Return the blocks that rules serve and, for every other module with parameters, the reason against it.

    Args:
        model: The network.
        parameters: Those to be optimized; a module whose weight is not among them is left alone.
        affine: Whether normalisation layers are served.
        skip: fnmatch patterns of module names to leave plain.
        composite: Whether to serve modules that share a weight, and any module by the generic rule.
    """
    wanted = {id(p) for p in parameters}
    modules = dict(model.named_modules())
    served: dict[str, RoutedModule] = {}
    reasons: dict[str, str] = {}
    unserved_attention: list[str] = []
    for name, module in modules.items():
        parametrized, inside, _ = name.partition(".parametrizations.")
        own = [p for p in module.parameters(recurse=is_parametrized(module)) if id(p) in wanted]
        if not own or (inside and parametrized in served):
            continue
        rule, reason = rule_for(module)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            rule, reason = None, SKIPPED
        elif inside:
            rule, reason = None, reasons[parametrized]
        elif is_replaced(module):
            rule, reason = None, "its forward was replaced on the instance"
        elif name.rpartition(".")[0] in unserved_attention:
            rule, reason = None, "MultiheadAttention reads its weight without calling it"
        elif rule is not None and _is_normalisation(module) and not affine:
            rule, reason = None, NORMALISATION
        elif isinstance(rule, GenericRule) and not composite:
            rule, reason = None, f"no rule for {type(module).__name__}"
        elif rule is not None and not isinstance(rule, GenericRule):
            if _weight(module) is None:
                rule, reason = None, "its weight is computed before every forward"
            elif id(_weight(module)) not in wanted:
                rule, reason = None, "its weight is not optimized here"
        if rule is None:
            reasons[name] = reason
            if isinstance(module, nn.MultiheadAttention):
                unserved_attention.append(name)
        else:
            served[name] = RoutedModule(name, module, rule)

    groups = _modules_with_common_parameters(modules)
    blocks: list[ParameterBlock] = []
    for name in list(served):
        group = groups.get(name, [name])
        if len(group) > 1 and not (composite and _share_a_weight([served.get(other) for other in group])):
            others = ", ".join(other or "the model itself" for other in group if other != name)
            reasons[name] = f"shares a parameter with {others}"
        elif name == group[0]:
            blocks.append(ParameterBlock([served[other] for other in group], len(blocks)))
    time_first = _time_first(model)
    for routed in served.values():
        routed.time_first = routed.owner in time_first
    return blocks, reasons


def listed(reasons: Mapping[str, str]) -> str:
    """Return modules with the reasons against them as one line."""
    return "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in reasons.items())


def _weight(module: nn.Module) -> nn.Parameter | None:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return parameters_of(module).get(name)


def _is_normalisation(module: nn.Module) -> bool:
    """Return whether the module normalises: torch's own, or one with vectors that says so in its name."""
    vectors = all(p.numel() == max(p.shape, default=1) for p in module.parameters())
    return isinstance(module, NORMALISATIONS) or ("Norm" in type(module).__name__ and vectors)


def _modules_with_common_parameters(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return for every module that shares parameters all modules that it shares with, itself included."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    groups: dict[str, list[str]] = {}
    for names in owners.values():
        if len(names) > 1:
            joined = {other for name in names for other in groups.get(name, [name])}
            in_order = [name for name in modules if name in joined]
            groups |= dict.fromkeys(in_order, in_order)
    return groups


def _share_a_weight(group: Sequence[RoutedModule | None]) -> bool:
    """Return whether the modules of a group, None for one that is not served, have one weight."""
    served = [m for m in group if m is not None and not isinstance(m.rule, GenericRule)]
    return len(served) == len(group) and len({id(_weight(m.owner)) for m in served}) == 1


def _time_first(model: nn.Module) -> set[nn.Module]:
    """Return the modules between the attentions of torch's Transformer layers with batch_first=False."""
    found: set[nn.Module] = set()
    for module in model.modules():
        layer: Any = module
        own = list(module.children())
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
            layer = module.layers[0]
            own = [] if module.norm is None else [module.norm]
        elif not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            continue
        # Users stack layers of their own, too, which need not have an attention.
        if not getattr(getattr(layer, "self_attn", None), "batch_first", True):
            found.update(child for child in own if not isinstance(child, nn.MultiheadAttention))
    return found
