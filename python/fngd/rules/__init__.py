"""Which rule serves which module."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .affine import AffineRule
from .attention import InputProjection, ProjectionRule, attention
from .base import Rule, Use, added
from .batch_norm import BatchNormRule
from .conv import ConvRule, ConvTransposeRule
from .embedding import EmbeddingRule
from .generic import GenericRule
from .linear import LinearRule, TransposedLinearRule
from .opaque import Opaque
from .tied import Part, tied_gram

__all__ = ["InputProjection", "Opaque", "Part", "Rule", "Use", "added", "attention", "rule_for", "tied_gram"]

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


def rule_for(module: nn.Module) -> tuple[Rule | None, str]:
    """Return (rule, its name), or (None, the reason why the module keeps the plain gradient).

    Subclasses share their parent's rule as long as they do not compute differently.
    """
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return _TRANSPOSED_LINEAR, _TRANSPOSED_LINEAR.name
    rule: Rule = _GENERIC
    for kind, own in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward and not is_parametrized(module):
            rule = own
    reason = rule.reason_against(module)
    return (None, reason) if reason else (rule, rule.name)
