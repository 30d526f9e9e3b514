"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# One cache for each instruction set: inductor would take what it compiled for another one, and compute wrong
# numbers.
COMPILED = Path(__file__).parents[1] / "build" / f"inductor-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))

# MKL's batched LU (torch.linalg.solve, the truth of several tests) fails, or returns wrong numbers, once the
# number of threads was lowered to one and raised again in a process: tests start with one and stay there.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the reliability campaign at full size")
    parser.addoption("--tally", metavar="PATH", help="write what became of the campaign's cases, as JSON")


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture(params=["native", "library"])
def route(request, monkeypatch):
    """Run the test through the native kernel, then through torch.linalg."""
    # Here, because this file chooses how Triton runs before the kernels are imported.
    from fngd_kernels import native
    from fngd_kernels.ops import choose

    if request.param == "library":
        monkeypatch.setattr(choose, "NATIVE_MAX_ORDER", {})
    elif not native.AVAILABLE:
        pytest.skip("the native extension is not built")
    return request.param


def pytest_collection_modifyitems(items):
    """Leave out what needs a device where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
