"""Faults of torch itself, each told by trying it in a process of its own; docs/reliability.md lists them."""

import functools
import subprocess
import sys
import textwrap

import pytest

ONE_TAP = """
    import torch
    torch.set_num_threads(1)
    layer = torch.nn.Conv2d(2, 4, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(8, 2, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(200):
        layer(x).square().sum().backward()
"""
"""oneDNN writes past its scratch memory in the weight gradient."""


@functools.cache
def _ends_well(program: str) -> bool:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def skip_where_torch_fails(program: str) -> None:
    """Skip a test that lets torch do what ends its process on this processor."""
    if not _ends_well(program):
        pytest.skip("torch itself ends the process on this processor: strided convolution of one tap")
