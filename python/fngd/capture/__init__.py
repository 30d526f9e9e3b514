"""From the calls of modules to the complete uses of their parameters: read `collector.py` first."""

from .block import EMPTY, EVAL_MODE, Gradients, ParameterBlock, RoutedModule, Uses
from .collector import Collected, UseCollector, combined
from .discovery import USER_REASONS, find_blocks, listed
from .grams import layer_grams
from .routing import reason_against_routing, release, route
from .shared import SharedParameters

__all__ = [
    "EMPTY",
    "EVAL_MODE",
    "USER_REASONS",
    "Collected",
    "Gradients",
    "ParameterBlock",
    "RoutedModule",
    "SharedParameters",
    "UseCollector",
    "Uses",
    "combined",
    "find_blocks",
    "layer_grams",
    "listed",
    "reason_against_routing",
    "release",
    "route",
]
