"""Every tile compiles for its architectures, spills no register and fits into shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_cases import CASES, VARIANTS

HERE = Path(__file__).parent
SHARED_KIB = {80: 163, 90: 227, 100: 227}

# Each kernel once on every architecture, and on Hopper in every kind of arithmetic.
FEW = {80: ["bfloat16-ieee"], 90: ["bfloat16-ieee", "float32-ieee", "float32-tf32"], 100: ["bfloat16-ieee"]}


def compile_in_own_process(arch, names):
    """The interpreter replaces Triton's compiler in this process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    command = [sys.executable, str(HERE / "compile_cases.py"), str(arch), *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_fits(arch, variants):
    names = [f"{case}-{variant}" for case in CASES for variant in variants]
    kernels = compile_in_own_process(arch, names)
    assert {kernel["case"] for kernel in kernels} == set(names)
    assert not [kernel for kernel in kernels if kernel["spilled"]]
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED_KIB[arch] << 10]


@pytest.mark.parametrize("arch", FEW)
def test_compiles(arch):
    assert_fits(arch, FEW[arch])


@pytest.mark.slow_compile
@pytest.mark.parametrize("arch", FEW)
def test_every_variant_compiles(arch):
    assert_fits(arch, VARIANTS)
