"""Which rule serves which module; `register` adds one."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..routed_class import own_forward
from .affine import AffineRule
from .attention import InputProjection, ProjectionRule, attention
from .base import Rule, Use, added
from .batch_norm import BatchNormRule
from .conv import ConvRule, ConvTransposeRule
from .embedding import EmbeddingRule, ScaledEmbeddingRule
from .generic import GenericModule, GenericRule, reason_against_call
from .linear import LinearRule, TransposedLinearRule, is_linear_map, layer_of
from .parts import BiasRule, PartRule, bias_rule, weight_rule
from .tied import block_gram

__all__ = [
    "BiasRule",
    "GenericModule",
    "GenericRule",
    "InputProjection",
    "PartRule",
    "Rule",
    "Use",
    "added",
    "attention",
    "bias_rule",
    "block_gram",
    "is_linear_map",
    "layer_of",
    "reason_against_call",
    "register",
    "rule_for",
    "weight_rule",
]

_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv1d: ConvRule(),
    nn.Conv2d: ConvRule(),
    nn.Conv3d: ConvRule(),
    nn.ConvTranspose1d: ConvTransposeRule(),
    nn.ConvTranspose2d: ConvTransposeRule(),
    nn.ConvTranspose3d: ConvTransposeRule(),
    nn.Embedding: EmbeddingRule(),
    nn.MultiheadAttention: ProjectionRule(),
    nn.LayerNorm: AffineRule(),
    nn.RMSNorm: AffineRule(),
    nn.GroupNorm: AffineRule(),
    nn.BatchNorm1d: BatchNormRule(),
    nn.BatchNorm2d: BatchNormRule(),
    nn.BatchNorm3d: BatchNormRule(),
}
_GENERIC = GenericRule()
_TRANSPOSED_LINEAR = TransposedLinearRule()
_SCALED_EMBEDDING = ScaledEmbeddingRule()

COMPLEX = "complex parameters"
"""Reason for the plain gradient of modules that have them: Gram matrices are real."""

_METHODS = ("reason_against", "batched", "forward", "gram", "contributions", "combine")


def register(module_type: type[nn.Module], rule: Rule) -> None:
    """Serve the modules of a type by a rule, in optimizers made from now on.

    Subclasses that have the type's own `forward` take the rule too, unless a nearer type has one.

    Args:
        module_type: A subclass of torch.nn.Module; one that has a rule gets this one in its place.
        rule: A `fngd.rules.Rule`, or an object with its attributes.

    Raises:
        TypeError: No type of modules, or a rule without a name or one of the methods.
        ValueError: The name of the generic rule.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type: expected a subclass of torch.nn.Module, got {module_type!r}")
    if isinstance(rule, type):
        raise TypeError(f"rule: expected an object, got the class {rule.__name__}")
    missing = [method for method in _METHODS if not callable(getattr(rule, method, None))]
    if not isinstance(getattr(rule, "name", None), str):
        missing.insert(0, "name")
    if missing:
        raise TypeError(
            f"rule: expected an fngd.rules.Rule, {type(rule).__name__} lacks {', '.join(missing)}"
        )
    if rule.name == _GENERIC.name:
        raise ValueError(f"rule: expected a name of its own, got {rule.name!r}")
    _RULES[module_type] = rule


def rule_for(module: nn.Module) -> tuple[Rule | None, str]:
    """Return (rule, its name), or (None, the reason why the module keeps the plain gradient).

    Subclasses share the rule of their nearest parent with one, as long as they do not compute differently.
    """
    kind = next((kind for kind in type(module).__mro__ if kind in _RULES), None)
    rule: Rule = _GENERIC
    if kind is not None and own_forward(module) is kind.forward and not is_parametrized(module):
        rule = _RULES[kind]
    elif type(module).__module__.startswith("transformers."):
        rule = _of_hugging_face(module)
    own = module.parameters(recurse=is_parametrized(module))
    reason = COMPLEX if any(p.is_complex() for p in own) else rule.reason_against(module)
    return (None, reason) if reason else (rule, rule.name)


def _of_hugging_face(module: nn.Module) -> Rule:
    """Return the rule of a type that the transformers package defines, known by its name."""
    kind = type(module).__name__
    if kind == "Conv1D":
        return _TRANSPOSED_LINEAR
    if isinstance(module, nn.Embedding) and kind.endswith("ScaledWordEmbedding"):
        return _SCALED_EMBEDDING
    return _GENERIC
