"""The core of the solve, csrc/solve.h, alone: on the host with teams of threads, and compiled for a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")


def compile_host(target: Path, *flags: str) -> subprocess.CompletedProcess:
    source = str(HERE / "solve_team.cpp")
    command = [
        str(CXX),
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-pthread",
        *flags,
        source,
        "-o",
        str(target),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_teams_of_threads_agree_with_a_plain_cholesky(tmp_path):
    built = compile_host(tmp_path / "solve_team")
    assert built.returncode == 0, built.stderr
    assert not built.stderr, "compiles without a warning"
    done = subprocess.run([tmp_path / "solve_team"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_teams_of_threads_have_no_data_race(tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    program = tmp_path / "probe"
    built = subprocess.run(
        [str(CXX), "-fsanitize=thread", str(probe), "-o", str(program)], capture_output=True
    )
    if built.returncode or subprocess.run([program]).returncode:
        pytest.skip("the compiler has no working thread sanitizer")
    assert compile_host(tmp_path / "solve_team", "-fsanitize=thread").returncode == 0
    done = subprocess.run([tmp_path / "solve_team"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_as_device_code_without_spills(tmp_path, arch):
    command = [str(NVCC), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
    command += ["-o", str(tmp_path / "solve.cubin"), str(HERE / "solve_device.cu")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2, built.stderr
