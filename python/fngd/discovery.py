"""Finds the modules of a model that rules serve; those that share a weight are one layer."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .capture import Layer, Member, is_replaced
from .rules import rule_for

SKIPPED = "skipped"
NORMALISATION = 'normalisation (norms="plain")'
WISHES = (SKIPPED, NORMALISATION)
"""Reasons for the plain gradient that the user gave."""


def find_layers(
    model: nn.Module,
    parameters: Iterable[Tensor],
    *,
    affine: bool,
    skip: Sequence[str] = (),
    composite: bool = True,
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that rules serve and, for every other module with parameters, the reason against it.

    parameters: those to be optimized; a module whose weight is not among them is left alone.
    affine: whether normalisation layers are served.
    skip: fnmatch patterns of module names to leave plain.
    composite: whether to serve modules that share a weight, and any module by the generic rule.
    """
    wanted = {id(p) for p in parameters}
    modules = dict(model.named_modules())
    served: dict[str, Member] = {}
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
        elif rule is not None and rule.name == "generic" and not composite:
            rule, reason = None, f"no rule for {type(module).__name__}"
        elif rule is not None and rule.name != "generic" and _weight(module) is None:
            rule, reason = None, "its weight is computed before every forward"
        elif rule is not None and rule.name != "generic" and id(_weight(module)) not in wanted:
            rule, reason = None, "its weight is not optimized here"
        if rule is None:
            reasons[name] = reason
            if isinstance(module, nn.MultiheadAttention):
                unserved_attention.append(name)
        else:
            served[name] = Member(name, module, rule)

    groups = _sharing(modules)
    layers: list[Layer] = []
    for name in list(served):
        group = groups.get(name, [name])
        if len(group) > 1 and not (composite and _share_a_weight([served.get(other) for other in group])):
            others = ", ".join(other or "the model itself" for other in group if other != name)
            reasons[name] = f"shares a parameter with {others}"
        elif name == group[0]:
            layers.append(Layer([served[other] for other in group], len(layers)))
    time_first = _time_first(model)
    for member in served.values():
        member.time_first = member.owner in time_first
    return layers, reasons


def _weight(module: nn.Module) -> nn.Parameter | None:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return module._parameters.get(name)


_NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _is_normalisation(module: nn.Module) -> bool:
    """Return whether the module normalises: torch's own, or one with vectors that says so in its name."""
    vectors = all(p.numel() == max(p.shape, default=1) for p in module.parameters())
    return isinstance(module, _NORMALISATIONS) or ("Norm" in type(module).__name__ and vectors)


def _sharing(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
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


def _share_a_weight(members: Sequence[Member | None]) -> bool:
    """Return whether the members, None for a module that is not served, are one layer with one weight."""
    served = [member for member in members if member is not None and member.rule.name != "generic"]
    return len(served) == len(members) and len({id(_weight(member.owner)) for member in served}) == 1


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
