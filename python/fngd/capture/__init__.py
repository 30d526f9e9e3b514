"""From the calls of modules to the complete uses of their parameters: read `collector.py` first."""

from .block import Gradients, ParameterBlock, RoutedModule, Uses
from .collector import Collected, UseCollector, combined
from .discovery import USER_REASONS, find_blocks
from .grams import layer_grams
from .routing import release, route

__all__ = [
    "USER_REASONS",
    "Collected",
    "Gradients",
    "ParameterBlock",
    "RoutedModule",
    "UseCollector",
    "Uses",
    "combined",
    "find_blocks",
    "layer_grams",
    "release",
    "route",
]
