"""Kernels run on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow_compile: compiles every variant of every kernel; by request only"
    )


def pytest_collection_modifyitems(config, items):
    if "slow_compile" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow_compile"):
                item.add_marker(pytest.mark.skip(reason="by request: pytest -m slow_compile"))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
