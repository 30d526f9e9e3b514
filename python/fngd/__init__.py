"""FNGD: natural-gradient training at first-order cost, as a drop-in PyTorch optimizer."""

from .grams import layer_grams
from .optimizer import FNGD
from .samples import track

__all__ = ["FNGD", "layer_grams", "track"]
__version__ = "0.1.0"
