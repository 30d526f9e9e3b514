"""Finds the modules of a model that rules serve; those that share a weight are one block of parameters."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..rules import BiasRule, GenericRule, Rule, bias_rule, rule_for, weight_rule
from ..torch_private import NORMALISATIONS, parameters_of
from .block import ParameterBlock, RoutedModule
from .routing import is_replaced

SKIPPED = "skipped"
NORMALISATION = 'normalisation (norms="plain")'
FROZEN = "frozen when the optimizer was made"
USER_REASONS = (SKIPPED, NORMALISATION, FROZEN)
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
        parameters: Those to be optimized. Of a layer of which only the weight or only the bias is among them,
            or trained, that one is served where there is a rule for it.
        affine: Whether normalisation layers are served.
        skip: fnmatch patterns of the names of modules to leave plain, with all inside them.
        composite: Whether to serve modules that share a weight, single parameters of a layer, and any module
            by the generic rule.

    Raises:
        TypeError: A pattern that is no string.
        ValueError: A pattern that is the name of no module; a parameter to be optimized that has no values
            yet: it is uninitialized, or on the meta device.
    """
    skipped = _matching(model, skip)
    wanted = {id(p) for p in parameters}
    _check_values(model, wanted)
    modules = dict(model.named_modules())
    served: dict[str, RoutedModule] = {}
    reasons: dict[str, str] = {}
    unserved_attention: list[str] = []
    for name, module in modules.items():
        parametrized, inside, _ = name.partition(".parametrizations.")
        own = [p for p in module.parameters(recurse=is_parametrized(module)) if id(p) in wanted]
        if not own:
            if isinstance(module, nn.MultiheadAttention):
                unserved_attention.append(name)
            continue
        if inside and parametrized in served:
            continue
        rule, reason = rule_for(module)
        if module in skipped:
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
        elif isinstance(rule, GenericRule):
            if any(p.requires_grad and id(p) not in wanted for p in module.parameters()):
                rule, reason = None, "some of its parameters are not optimized here"
        elif rule is not None:
            rule, reason = _rule_of_part(rule, module, wanted, alone=composite)
            if isinstance(rule, BiasRule) and id(_weight(module)) in wanted:
                reasons[name] = FROZEN  # its weight
        if rule is None:
            reasons[name] = reason
            if isinstance(module, nn.MultiheadAttention):
                unserved_attention.append(name)
        else:
            served[name] = RoutedModule(name, module, rule)

    owners = _owners(modules)
    groups = _modules_with_common_parameters(modules, owners)
    blocks: list[ParameterBlock] = []
    for name, routed in served.items():
        group = groups.get(name, [name])
        if isinstance(routed.rule, BiasRule):  # which leaves the weight alone, whoever has it too
            group = owners[routed.module.weight]
        if len(group) > 1 and not (composite and _share_a_weight([served.get(other) for other in group])):
            others = ", ".join(other or "the model itself" for other in group if other != name)
            reasons[name] = f"shares a parameter with {others}"
        elif name == group[0]:
            blocks.append(ParameterBlock([served[other] for other in group], len(blocks)))
    time_first = _time_first(model)
    for routed in served.values():
        routed.time_first = routed.owner in time_first
    return blocks, reasons


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    """Return the modules whose names match a pattern, and those inside them."""
    named = dict(model.named_modules(remove_duplicate=False))
    found: set[nn.Module] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip: expected patterns of module names, got {type(pattern).__name__}")
        names = [name for name in named if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"skip: expected patterns of module names, {pattern!r} matches none")
        found.update(inner for name in names for inner in named[name].modules())
    return found


def listed(reasons: Mapping[str, str]) -> str:
    """Return modules with the reasons against them as one line."""
    return "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in reasons.items())


def _check_values(model: nn.Module, wanted: Collection[int]) -> None:
    """Raise ValueError where a parameter to be optimized has no values yet."""
    for name, p in model.named_parameters():
        if id(p) in wanted and is_lazy(p):
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"model: {name} of a {kind} is not initialized; run a batch through the model first, which "
                "gives lazy modules their parameters"
            )
        if id(p) in wanted and p.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device and has no values; materialise the model first (load "
                "its weights, or Module.to_empty and initialise), or leave the parameter out of params"
            )


def _rule_of_part(
    rule: Rule, module: nn.Module, wanted: Collection[int], *, alone: bool
) -> tuple[Rule | None, str]:
    """Return the rule for what is optimized of a layer, or (None, why it keeps the plain gradient).

    Args:
        rule: The rule of the layer as a whole.
        module: The layer.
        wanted: The parameters to be optimized, by id.
        alone: Whether the weight or the bias may be served without the other.
    """
    weight, bias = _weight(module), _bias(module)
    if weight is None:
        return None, "its weight is computed before every forward"
    if not alone:
        return (rule, "") if id(weight) in wanted else (None, "its weight is not optimized here")
    if bias is not None and bias.requires_grad and id(bias) in wanted:
        if id(weight) not in wanted:
            return bias_rule(rule), "its weight is not optimized here"
        return (rule, "") if weight.requires_grad else (bias_rule(rule), "its weight is frozen")
    if id(weight) not in wanted:
        return None, "its weight is not optimized here"
    if bias is not None and id(bias) not in wanted:
        return weight_rule(rule), "its bias is not optimized here"
    return rule, ""


def _weight(module: nn.Module) -> nn.Parameter | None:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return parameters_of(module).get(name)


def _bias(module: nn.Module) -> nn.Parameter | None:
    name = "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias"
    return parameters_of(module).get(name)


def _is_normalisation(module: nn.Module) -> bool:
    """Return whether the module normalises: torch's own, or one with vectors that says so in its name."""
    vectors = all(p.numel() == max(p.shape, default=1) for p in module.parameters())
    return isinstance(module, NORMALISATIONS) or ("Norm" in type(module).__name__ and vectors)


def _owners(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, list[str]]:
    """Return for every parameter the modules that have it."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return owners


def _modules_with_common_parameters(
    modules: Mapping[str, nn.Module], owners: Mapping[nn.Parameter, Sequence[str]]
) -> dict[str, list[str]]:
    """Return for every module that shares parameters all modules that it shares with, itself included."""
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
    return len(served) == len(group) and len({id(m.module.weight) for m in served}) == 1


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
