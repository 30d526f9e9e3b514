"""Which rule serves which module."""

from torch import nn

from .affine import AffineRule
from .attention import InputProjection, ProjectionRule, attention
from .base import Rule, Use, added
from .batch_norm import BatchNormRule
from .conv import ConvRule
from .embedding import EmbeddingRule
from .linear import LinearRule

__all__ = ["InputProjection", "Rule", "Use", "added", "attention", "rule_for"]

_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv1d: ConvRule(),
    nn.Conv2d: ConvRule(),
    nn.Conv3d: ConvRule(),
    nn.Embedding: EmbeddingRule(),
    nn.MultiheadAttention: ProjectionRule(),
    nn.LayerNorm: AffineRule(),
    nn.RMSNorm: AffineRule(),
    nn.GroupNorm: AffineRule(),
    nn.BatchNorm1d: BatchNormRule(),
    nn.BatchNorm2d: BatchNormRule(),
    nn.BatchNorm3d: BatchNormRule(),
}


def rule_for(module: nn.Module) -> tuple[Rule | None, str]:
    """Return (rule, its name), or (None, the reason why the module keeps the plain gradient).

    Subclasses share their parent's rule as long as they do not compute differently.
    """
    for kind, rule in _RULES.items():
        if not isinstance(module, kind):
            continue
        if type(module).forward is not kind.forward:
            return None, f"{type(module).__name__} has a forward of its own"
        reason = rule.reason_against(module)
        return (None, reason) if reason else (rule, rule.name)
    return None, f"no rule for {type(module).__name__}"
