"""The solver's core and the coefficients: on the host with teams of threads, and as CUDA code."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
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
    done = subprocess.run([tmp_path / "solve_team", "races"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("arch", "shared_memory", "orders"),
    [("sm_80", 163 << 10, (256, 192)), ("sm_90", 227 << 10, (320, 224)), ("sm_100", 227 << 10, (320, 224))],
)
def test_cuda_kernels_compile_without_spills_and_fit_shared_memory(tmp_path, arch, shared_memory, orders):
    command = [str(NVCC), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
    command += ["-o", str(tmp_path / "solve.cubin"), str(CSRC / "solve_cuda.cu")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    # float and double, solve and coefficients, scratch in shared and in global memory
    assert built.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 8, (
        built.stderr
    )
    assert " bytes smem" not in built.stderr, "the shared memory is all dynamic"
    for size, order in zip((4, 8), orders, strict=True):
        assert scratch_bytes(order, size) <= shared_memory < scratch_bytes(order + 128 // size, size)


def scratch_bytes(order: int, size: int) -> int:
    """Return what DampedCholesky::scratch_size asks for on CUDA: triangular tiles and three vectors."""
    tile = 128 // size
    tiles = -(-order // tile)
    return (tile * tile * tiles * (tiles + 1) // 2 + 3 * tiles * tile) * size
