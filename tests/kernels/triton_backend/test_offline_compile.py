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


def compile_in_own_process(arch, names):
    """The interpreter replaces Triton's compiler in this process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[2]), *sys.path])
    command = [sys.executable, str(HERE / "compile_cases.py"), str(arch), *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_fits(arch, names, *flags):
    """Return what was compiled."""
    kernels = compile_in_own_process(arch, [*flags, *names])
    assert {kernel["case"] for kernel in kernels} == set(names)
    assert not [kernel for kernel in kernels if kernel["spilled"]]
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED_KIB[arch] << 10]
    return kernels


@pytest.mark.parametrize("variant", ["bfloat16-ieee", "float32-ieee"])
def test_every_case_compiles_for_hopper(variant):
    assert_fits(90, [f"{case}-{variant}" for case in CASES])


def test_layers_of_real_networks_use_the_tensor_cores_of_hopper_and_load_16_bytes():
    kernels = assert_fits(90, ["networks-bfloat16-ieee"], "--instructions")
    kernels = [kernel for kernel in kernels if kernel["kernel"] != "_sum_partials_kernel"]
    assert len({kernel["kernel"] for kernel in kernels}) == 5
    for kernel in kernels:
        products = {name.split(".")[0] for name in kernel["instructions"] if "MMA" in name or "FMA" in name}
        assert "HGMMA" in products, kernel
        assert "HMMA" not in products, kernel
        loads = {name for name in kernel["instructions"] if name.startswith("LDG") and "U16" in name}
        assert not loads, kernel
        copies = {name for name in kernel["instructions"] if name.startswith("LDGSTS.")}
        assert all(name.endswith(".128") for name in copies), kernel
        # One step needs no copies in advance.
        assert copies or "LDG.E.128" in kernel["instructions"], kernel


@pytest.mark.parametrize("arch", [80, 100])
def test_every_kernel_compiles(arch):
    assert_fits(arch, [f"{case}-bfloat16-ieee" for case in CASES], "--first")


@pytest.mark.slow_compile
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_every_variant_compiles(arch, variant):
    assert_fits(arch, [f"{case}-{variant}" for case in CASES])
