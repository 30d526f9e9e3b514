"""Fill Triton's cache without a GPU: `python -m bench.gpu.precompile gate quick steps training`.

Kernels that benchmarks launch on a GPU are compiled through Triton's own way, so that a machine with the same
versions finds them in the cache (TRITON_CACHE_DIR, whose path has to be the same there).
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import build, driver
from triton.runtime.jit import JITFunction

import fngd
from bench.gpu.meta import launching, meta
from bench.kernels.case import Case
from bench.kernels.cases import cases
from bench.kernels.shapes import NETWORKS, TINY
from bench.models.translator import Translator
from bench.steps.contenders import SKETCH
from bench.steps.networks import MIXED, Batch, Network
from fngd_kernels.ops.gram import with_positions
from fngd_kernels.ops.registration import OPERATORS

HALF = torch.bfloat16
VOCABULARY = 10_000
FUSED = ("gram", "gram_conv", "gram_embedding", "sketch", "combine_embedding")
# Triton's platform_key() with and without the program `file`, which platform.architecture() asks.
PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")


def gate() -> None:
    """Launch what `bench.kernels --tiny --gate` launches."""
    _kernels(cases([TINY], [HALF, torch.float16, torch.float32], torch.device("meta"), quick=True))


def quick() -> None:
    """Launch what `bench.kernels --quick` launches."""
    _kernels(cases(NETWORKS, [HALF], torch.device("meta"), quick=True))


def steps() -> None:
    """Launch what solving steps of `bench.steps --size gpu` launch."""
    for sizes in MIXED.values():
        for sketch in (None, SKETCH):
            _solving_step(sizes["gpu"], sketch)


def training() -> None:
    """Launch what solving epochs on CIFAR-10 and Multi30k launch, in batches of 128 and the last one."""
    images = replace(MIXED["resnet"]["gpu"], memory_format=torch.contiguous_format)
    sentences = replace(MIXED["transformer"]["gpu"], model=_translator)
    for samples in (128, 45_000 % 128):
        _solving_step(replace(images, batch=partial(_images, samples)))
    # Lengths of sentences: what they are multiples of, and in how many blocks they are taken.
    for samples, length in product((128, 29_000 % 128), (12, 16, 17, 24, 32, 33, 47, 48)):
        _solving_step(replace(sentences, batch=partial(_sentences, samples, length)))


def _images(samples: int) -> Batch:
    return torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,))


def _translator() -> nn.Module:
    return Translator(vocabulary=VOCABULARY, padding=0, layers=3, dimension=512, heads=8, hidden=2048)


def _sentences(samples: int, length: int) -> Batch:
    return tuple(torch.randint(VOCABULARY, (samples, length)) for _ in range(3))


JOBS = {job.__name__: job for job in (gate, quick, steps, training)}


class Compiled:
    """Triton's driver of a GPU that is not there, and what was compiled for it."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.kernels: dict[int, Any] = {}
        self.utils: Any = None

    def get_current_device(self) -> int:
        """Return the only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


@contextmanager
def compiling(capability: tuple[int, int]) -> Iterator[Compiled]:
    """Compile what is launched on meta tensors for a GPU of this capability, instead of launching it."""
    compiled, run = Compiled(capability), JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        result = run(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled.kernels[id(result)] = result

    driver.set_active(compiled)
    with launching(compile_only, capability):
        yield compiled


def build_launchers(compiled: Compiled) -> None:
    """Build what Triton writes in C to launch each kernel, against a stub of libcuda; load none of it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        command = ["gcc", "-shared", "-x", "c", "-", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
        # All launchers call it: a linker would leave out a library that nothing is taken from.
        subprocess.run(command, check=True, input=b"void cuGetErrorString(void) {}")
        with (
            mock.patch.object(triton.knobs.nvidia, "libcuda_path", folder),
            mock.patch.object(build, "_load_module_from_path"),
        ):
            for platform in PLATFORMS:
                with mock.patch.object(build, "platform_key", lambda platform=platform: platform):
                    compiled.utils = CudaUtils()
                    for kernel in compiled.kernels.values():
                        CudaLauncher(kernel.src, kernel.metadata)


def _kernels(chosen: Iterator[Case]) -> None:
    with _OnCuda():
        for case in chosen:
            inputs = case.inputs()
            for contender in case.contenders.values():
                if contender.role == "fngd":
                    contender.run(*inputs)


def _solving_step(network: Network, sketch: int | None = None) -> None:
    """Run forward and backward on fake tensors, which have no data."""
    with FakeTensorMode(), _OnCuda():
        batch, model = network.draw(torch.device("cpu")), network.model()
        fngd.layer_grams(model, lambda: network.objective(model, *batch), sketch=sketch)


class _OnCuda(TorchDispatchMode):
    """Operators launch what they do on CUDA, on meta tensors."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.removeprefix("fngd::")
        if name in FUSED and op.namespace == "fngd":
            with unset_fake_temporarily():
                inputs = [meta(x) for x in args]
                OPERATORS[name](*inputs)
                # What a solving step launches for equal layers at once, and combines with its coefficients.
                if name == "gram":
                    a, e, bias, workspace = inputs[:4]
                    layers = ([x] * 2 for x in with_positions(a, e))
                    OPERATORS["gram_batch"](*layers, bias, workspace)
                elif name == "gram_embedding":
                    ids, e, padding_idx = inputs[:3]
                    s = torch.empty(len(ids), device="meta")
                    OPERATORS["combine_embedding"](ids, e, s, VOCABULARY, padding_idx)
        return op(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> None:
    """Do the jobs named, and say what each cost."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.precompile", description=__doc__)
    parser.add_argument("job", nargs="+", choices=JOBS)
    parser.add_argument("--capability", type=lambda text: tuple(map(int, text.split("."))), default=(9, 0))
    options = parser.parse_args(argv)
    with compiling(options.capability) as compiled:
        for name in options.job:
            start, before = time.monotonic(), len(compiled.kernels)
            JOBS[name]()
            count, seconds = len(compiled.kernels) - before, time.monotonic() - start
            print(f"{name}: {count} kernels more, {seconds:.1f} s", flush=True)
    start = time.monotonic()
    build_launchers(compiled)
    print(f"launchers: {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
