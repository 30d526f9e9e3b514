"""Layers on which torch itself fails on a CPU are trained by FNGD; docs/reliability.md lists these faults."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# glibc's own check of every block that is freed, where it is installed.
CHECKED = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")

# The weight gradient of a strided convolution of one tap writes past oneDNN's scratch memory where channels
# come last and are fewer than a vector register holds: with AVX2 for any image, with AVX-512 for larger ones.
PROGRAM = """
    import sys
    import torch, fngd
    from torch import nn

    torch.set_num_threads(1)
    steps = int(sys.argv[1])
    formats = {
        "contiguous": lambda t: t.contiguous(),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "a part of others": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    }

    def train(channels, size, order, share, steps):
        torch.manual_seed(0)
        layer = nn.Conv2d(channels, 4, 1, stride=2)
        layer.weight = nn.Parameter(order(layer.weight.detach()))
        model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        x, y = order(torch.randn(4, channels, size, size)), torch.randn(4, 16)
        opt = fngd.FNGD(model, lr=0.05, share=share)
        losses = []
        for _ in range(steps):
            opt.set_samples(range(4))
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert opt.coverage()["0.weight"] == "conv", opt.coverage()
        assert losses[-1] < losses[0], losses

    for channels, size in ((1, 8), (2, 8), (3, 64)):
        for name, order in formats.items():
            train(channels, size, order, "sample", steps)
            train(channels, size, order, "none", steps // 10)
            print(channels, size, name)
"""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2"])
def test_strided_convolutions_of_one_tap_are_trained(instructions, native):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "MALLOC_CHECK_": "3"}
    environment |= {} if native else {"FNGD_NO_EXTENSION": "1"}
    environment |= {"LD_PRELOAD": str(CHECKED)} if CHECKED.exists() else {}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), "1000" if native else "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 9
