"""One training run within a budget of CPU seconds, its error measured on the way, off the clock.

CPU seconds of the process: what else runs on the machine does not count against a method.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from bench.peers import pinn_of
from bench.peers.base import Setting
from bench.pinn.problems import Problem, mean_squares, relative_error
from bench.pinn.task import Task

MARKS = 50
# Early enough for what overfits within a few steps.
FIRST_MARK = 1 / 3000


@dataclass(frozen=True)
class Run:
    """What is trained, by what, for how many CPU seconds."""

    problem: str
    method: str
    setting: Setting
    seed: int
    seconds: float


@dataclass(frozen=True)
class Record:
    """Loss and relative errors after `step` iterations, of the coefficient too where one is sought."""

    step: int
    seconds: float
    loss: float
    validation_error: float
    test_error: float
    coefficient_error: float | None = None


def train(run: Run, problem: Problem, task: Task) -> Iterator[Record]:
    """Train `task.network`; yield a record at the start, at marks in geometric progression, and at the end.

    A run whose loss is not finite ends there, without a record of it.
    """
    build = pinn_of(run.method).build
    # First calls import and compile; a copy pays for that.
    rehearsal = Task(problem, copy.deepcopy(task.network), task.points)
    build(rehearsal, **run.setting)(0.0)
    step = build(task, **run.setting)
    marks = iter(np.geomspace(FIRST_MARK, 1, MARKS) * run.seconds)
    yield measure(task, 0, 0.0)
    steps, seconds, mark = 0, 0.0, next(marks)
    while seconds < run.seconds:
        start = time.process_time()
        steps += step(seconds / run.seconds)
        seconds += time.process_time() - start
        if seconds >= mark:
            record = measure(task, steps, seconds)
            if not math.isfinite(record.loss + record.validation_error + record.test_error):
                return
            yield record
            mark = next((later for later in marks if later > seconds), run.seconds)


def measure(task: Task, step: int, seconds: float) -> Record:
    """Return the loss at the training points and errors at fresh ones."""
    problem, network = task.problem, task.network
    return Record(
        step=step,
        seconds=seconds,
        loss=mean_squares(task.residuals()).item(),
        validation_error=relative_error(network, problem.validation),
        test_error=relative_error(network, problem.test),
        coefficient_error=coefficient_error(problem, network),
    )


def coefficient_error(problem: Problem, network: nn.Module) -> float | None:
    """Return |c - true c| / |true c|, None where the problem seeks no coefficient."""
    if problem.coefficient is None:
        return None
    found = network.get_parameter("coefficient").item()
    return abs(found - problem.coefficient) / abs(problem.coefficient)
