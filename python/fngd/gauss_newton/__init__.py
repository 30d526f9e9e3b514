"""Gauss-Newton steps: residuals, their Jacobian from captured uses, a solve in sample space."""

from .optimizer import GaussNewton
from .residuals import PerSample

__all__ = ["GaussNewton", "PerSample"]
