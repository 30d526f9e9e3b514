"""FNGD: natural-gradient training at first-order cost, as a drop-in PyTorch optimizer."""

from .capture import layer_grams
from .gauss_newton import GaussNewton, PerSample
from .graphs import GraphedStep
from .optimizer import FNGD
from .samples import track

__all__ = ["FNGD", "GaussNewton", "GraphedStep", "PerSample", "layer_grams", "track"]
__version__ = "0.1.0"
