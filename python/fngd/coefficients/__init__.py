"""The coefficients s_n of the samples: solved for, kept, shared by later batches, reported."""

from .report import Report
from .schedule import SHARES, Batch, Schedule
from .solver import OUT_OF_MEMORY, Solved, Solver

__all__ = ["OUT_OF_MEMORY", "SHARES", "Batch", "Report", "Schedule", "Solved", "Solver"]
