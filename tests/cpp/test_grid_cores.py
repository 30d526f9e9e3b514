"""The cores of scaling and of the test for NaN and infinity: on the host, and compiled for a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.parametrize("core", ["finite", "scale_bias"])
def test_every_thread_of_the_grid(tmp_path, core):
    program = tmp_path / f"{core}_grid"
    command = [str(CXX), "-std=c++20", "-O1", "-Wall", "-Wextra"]
    command += [str(HERE / f"{core}_grid.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert not built.stderr, "compiles without a warning"
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("core", ["finite", "scale_bias"])
def test_compiles_without_spills(tmp_path, core, arch):
    command = [str(NVCC), "-std=c++17", "-O3", "-DFNGD_WITH_CUDA", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
    command += ["-o", str(tmp_path / f"{core}.cubin"), str(HERE.parents[1] / "csrc" / f"{core}_cuda.cu")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    clean = built.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    assert built.stderr.count("bytes stack frame") == clean > 0, built.stderr
    if core == "finite":
        assert clean == 1, built.stderr
