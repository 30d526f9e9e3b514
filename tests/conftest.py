"""Shared fixtures."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)
