"""The rule for modules of any kind: per-sample gradients by torch.func, if a trial shows no mixing."""

from .module import GenericModule
from .rule import GenericRule
from .trial import reason_against_call

__all__ = ["GenericModule", "GenericRule", "reason_against_call"]
