"""Shared fixtures of the benchmarks' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Commands may set another number of threads: each test begins with one and leaves what it found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
