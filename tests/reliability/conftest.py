"""The reliability campaign: its size, and the tally of what became of every case."""

import json
from collections import Counter

import pytest
from hypothesis import settings

QUICK, FULL = 20, 2000  # examples of each hypothesis test

settings.register_profile("quick", max_examples=QUICK, deadline=None, derandomize=True, database=None)
settings.register_profile("full", max_examples=FULL, deadline=None, database=None, print_blob=True)
tallies: dict[str, dict[str, Counter]] = {}


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "quick")


@pytest.fixture
def full(request):
    """Whether the whole campaign runs, or the quick part."""
    return request.config.getoption("--full")


@pytest.fixture
def tally():
    """Count cases: tally(area, what went in, what happened, cases=1)."""

    def count(area, given, outcome, cases=1):
        tallies.setdefault(area, {}).setdefault(given, Counter())[outcome] += cases

    return count


def pytest_sessionfinish(session):
    path = session.config.getoption("--tally")
    if path:
        with open(path, "w") as file:
            json.dump(tallies, file, indent=1)
