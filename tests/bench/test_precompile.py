"""Kernels compiled without a GPU, through Triton's own cache."""

import os
import subprocess
import sys

import pytest

from paths import ROOT

pytest.importorskip("triton")
PROGRAM = """
import torch
from bench.gpu import precompile
from bench.kernels.cases import cases
from bench.kernels.shapes import TINY

with precompile.compiling((9, 0)) as compiled:
    tiny = cases([TINY], [torch.float16], torch.device("meta"), quick=True)
    precompile._kernels(case for case in tiny if case.op == "gram_hadamard")
    precompile._solving_step(precompile.MIXED["transformer"]["small"])
precompile.build_launchers(compiled)
names = sorted({kernel.name for kernel in compiled.kernels.values()})
print(len(compiled.kernels), *names)
"""


def run(cache):
    """In a process of its own: the tests' kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_kernels_of_a_solving_step_are_in_the_cache(tmp_path):
    count, *names = run(tmp_path)
    assert {
        "_sum_chunks_kernel",
        "_gram_embedding_kernel",
        "_gram_hadamard_kernel",
        "_gram_pairs_kernel",
    } <= set(names)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len([path for path in files if path.suffix == ".cubin"]) == int(count)
    assert [path for path in files if path.name.startswith("cuda_utils")]
    # or the functions of the driver would be missing where they are loaded
    assert all(b"libcuda.so.1" in path.read_bytes() for path in files if path.suffix == ".so")
    assert run(tmp_path) == [count, *names]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
