"""Faults of torch itself, told by trying them in a process of their own; docs/reliability.md lists them."""

import functools
import subprocess
import sys
import textwrap

import pytest

# oneDNN writes past its scratch memory in the weight gradient.
ONE_TAP = """
    import torch
    torch.set_num_threads(1)
    layer = torch.nn.Conv2d(2, 4, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(8, 2, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(200):
        layer(x).square().sum().backward()
"""


def skip_where_torch_fails_at_strided_convolutions_of_one_tap() -> None:
    """Skip a test that trains such layers by torch alone."""
    if not _ends_well(ONE_TAP):
        pytest.skip("torch itself fails on this processor: strided convolutions of one tap, channels last")


@functools.cache
def _ends_well(program: str) -> bool:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False
