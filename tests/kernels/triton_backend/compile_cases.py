"""Compile, without a GPU, every kernel that a launcher would launch, and report what the code needs.

A case is a launch on meta tensors: signature, constants and alignments are those of the real launch.
`python compile_cases.py 90 gram_pairs-bfloat16-ieee ...` prints one JSON object for each compilation, with
`--first` one for each kernel of a case, with `--instructions` also what it multiplies and loads with: to
disassemble a kernel takes as long as to compile it.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = {
    f"{str(dtype).removeprefix('torch.')}-{precision}": (dtype, precision)
    for dtype, precision in [
        (BFLOAT16, "ieee"),
        (FLOAT16, "ieee"),
        (FLOAT32, "ieee"),
        (FLOAT32, "tf32"),
        (FLOAT32, "tf32x3"),
    ]
}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gram_pairs(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.gram_pairs import gram_pairs, gram_pairs_batch, gram_pairs_diag

    # Tiles of 2 positions, of some and of many; sizes that are multiples of 16 and that are not.
    for samples, positions, inputs, outputs in ((512, 2, 512, 2048), (63, 33, 513, 10), (32, 128, 768, 768)):
        a, e = meta(samples, positions, inputs, dtype=dtype), meta(samples, positions, outputs, dtype=dtype)
        gram_pairs(a, e, True, precision)
    gram_pairs_diag(a, e, True, precision)
    gram_pairs_batch([a, a], [e, e], True, precision)
    # So few tiles that they are small.
    for inputs in (512, 513):
        gram_pairs(meta(32, 8, inputs, dtype=dtype), meta(32, 8, 512, dtype=dtype), True, precision)


def gram_embedding(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.gram_embedding import gram_embedding, gram_embedding_diag

    for samples, positions, size in ((512, 2, 512), (63, 33, 513), (32, 128, 768)):
        ids, e = meta(samples, positions, dtype=torch.int64), meta(samples, positions, size, dtype=dtype)
        gram_embedding(ids, e, 0, precision)
    gram_embedding_diag(ids, e, None, precision)


def gram_hadamard(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.gram_hadamard import gram_hadamard, gram_hadamard_batch

    for samples in (128, 2048):
        for inputs, outputs in ((512, 512), (784, 512), (2048, 10), (513, 1000)):
            a, e = meta(samples, 1, inputs, dtype=dtype), meta(samples, 1, outputs, dtype=dtype)
            gram_hadamard(a, e, True, precision)
        gram_hadamard(a, e, False, precision)
    # The layers of one network.
    rows = [meta(256, 1, size, dtype=dtype) for size in (784, 1024, 1024, 512, 10)]
    for a, e in pairwise(rows):
        gram_hadamard(a, e, True, precision)
    gram_hadamard_batch(rows[1:2] * 2, rows[2:3] * 2, True, precision)


def gram_explicit(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.gram_explicit import gram_explicit

    precision = precision if dtype == FLOAT32 else None
    # Each in one chunk.
    for samples, size in ((256, 128), (64, 64), (16, 32)):
        a, e = meta(samples, 128, size, dtype=dtype), meta(samples, 128, 2 * size, dtype=dtype)
        gram_explicit(a, e, False, precision)


def gram_conv_explicit(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.gram_explicit import gram_conv_explicit
    from fngd_kernels.geometry import ConvGeometry

    precision = precision if dtype == FLOAT32 else None
    # First layers on images, in both layouts: columns of many kernel offsets, pixels and patches.
    for outputs, kernel, stride, padding in ((64, 7, 2, 3), (384, 16, 16, 0), (96, 4, 4, 0)):
        size = (224 + 2 * padding - kernel) // stride + 1
        x, e = meta(64, 3, 224, 224, dtype=dtype), meta(64, outputs, size, size, dtype=dtype)
        geometry = ConvGeometry((outputs, 3, kernel, kernel), (stride,) * 2, (padding,) * 2, (1, 1), 1)
        for layout in (torch.contiguous_format, torch.channels_last):
            x, e = (t.to(memory_format=layout) for t in (x, e))
            gram_conv_explicit(x, e, geometry, False, precision)
    for channels, layout in (
        (128, torch.contiguous_format),
        (128, torch.channels_last),
        (64, torch.contiguous_format),
        (3, torch.contiguous_format),
    ):
        x, e = meta(16, channels, 28, 28, dtype=dtype), meta(16, 128, 28, 28, dtype=dtype)
        x, e = (t.to(memory_format=layout) for t in (x, e))
        geometry = ConvGeometry((128, channels, 3, 3), (1, 1), (1, 1), (1, 1), 1)
        gram_conv_explicit(x, e, geometry, False, precision)


def combine_embedding(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.combine_embedding import combine_embedding

    ids, s = meta(64, 128, dtype=torch.int64), meta(64, dtype=FLOAT32)
    combine_embedding(ids, meta(64, 128, 768, dtype=dtype), s, 50257, 0)
    combine_embedding(ids, meta(64, 128, 77, dtype=dtype), s, 1001, None)


def networks(dtype: torch.dtype, precision: str) -> None:
    """Layers of ResNet-18 on 32 x 32 images, a Transformer (T = 30), GPT-2 (T = 1024)."""
    from fngd_kernels.backends.triton.gram_embedding import gram_embedding
    from fngd_kernels.backends.triton.gram_explicit import gram_conv_explicit, gram_explicit
    from fngd_kernels.backends.triton.gram_hadamard import gram_hadamard
    from fngd_kernels.backends.triton.gram_pairs import gram_pairs
    from fngd_kernels.geometry import ConvGeometry

    for inputs, outputs, kernel, stride, size in (
        (64, 64, 3, 1, 32),
        (64, 128, 3, 2, 32),
        (64, 128, 1, 2, 32),
        (128, 128, 3, 1, 16),
        (256, 256, 3, 1, 8),
    ):
        space = size // stride
        x, e = meta(128, inputs, size, size, dtype=dtype), meta(128, outputs, space, space, dtype=dtype)
        x, e = (t.to(memory_format=torch.channels_last) for t in (x, e))
        padding = (kernel // 2,) * 2
        geometry = ConvGeometry((outputs, inputs, kernel, kernel), (stride,) * 2, padding, (1, 1), 1)
        gram_conv_explicit(x, e, geometry, False)
    # A convolution of 4 x 4 positions by its patches.
    for positions, inputs, outputs in ((16, 4608, 512), (30, 512, 512), (30, 512, 2048), (30, 512, 10_000)):
        a, e = meta(128, positions, inputs, dtype=dtype), meta(128, positions, outputs, dtype=dtype)
        gram_pairs(a, e, True)
    for inputs, outputs in ((768, 2304), (3072, 768), (768, 50_272)):
        gram_explicit(meta(32, 1024, inputs, dtype=dtype), meta(32, 1024, outputs, dtype=dtype), False)
    gram_hadamard(meta(4096, 1, 512, dtype=dtype), meta(4096, 1, 512, dtype=dtype), True)
    # Autocast leaves what an embedding returns, and its gradient, in float32.
    for samples, positions, size in ((128, 30, 512), (32, 1024, 768)):
        ids, e = meta(samples, positions, dtype=torch.int64), meta(samples, positions, size, dtype=FLOAT32)
        gram_embedding(ids, e, 0)


def sketch(dtype: torch.dtype, precision: str) -> None:
    from fngd_kernels.backends.triton.sketch import sketch

    # Channels innermost, positions innermost, in groups, of formed contributions, and sizes without a factor.
    for x, groups, size in (
        (meta(64, 128, 512, dtype=dtype), 1, 64),
        (meta(64, 512, 784, dtype=dtype).mT, 1, 16),
        (meta(64, 784, 512, dtype=dtype), 32, 8),
        (meta(128, 1, 100_000, dtype=dtype), 1, 4096),
        (meta(64, 33, 513, dtype=dtype), 1, 10),
    ):
        y = meta(*x.shape[:2], groups * size, dtype=dtype)
        sketch(x, groups, size, 123456789, y)


# Each author adds the launches of a kernel: what a real layer would ask for.
CASES: dict[str, Callable[[torch.dtype, str], None]] = {
    "combine_embedding": combine_embedding,
    "gram_explicit": gram_explicit,
    "gram_conv_explicit": gram_conv_explicit,
    "gram_embedding": gram_embedding,
    "gram_hadamard": gram_hadamard,
    "gram_pairs": gram_pairs,
    "sketch": sketch,
}
NETWORKS = {"networks": networks}


def recorded(launch: Callable[[], None], arch: int) -> list[tuple]:
    """Return (kernel, arguments) of every kernel that `launch` would start on a GPU of that architecture."""
    launches = []

    def run(kernel, *, grid, warmup, **arguments):
        launches.append((kernel, arguments))

    properties = SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(arch, 10)),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
    ):
        launch()
    return launches


def source_of(kernel: JITFunction, arguments: dict, target: GPUTarget) -> tuple[ASTSource, dict]:
    """Return what Triton would compile for a launch, specialised as Triton does it, and the options."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(**arguments)
    options, *source = kernel._pack_args(backend, arguments, bound, specialisation, None)
    return ASTSource(kernel, *source), vars(options)


def compiled(source: ASTSource, options: dict, target: GPUTarget) -> tuple[dict, CompiledKernel]:
    """Compile, and return what the code needs of a multiprocessor, and the code."""
    # ptxas reports only when it runs.
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        result = triton.compile(source, target=target, options=options)
    needs = {
        "kernel": source.name,
        "shared": result.metadata.shared,
        "registers": int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", log.getvalue())[1]),
    }
    return needs, result


def instructions(result: CompiledKernel) -> set[str]:
    """Return the instructions of a kernel that multiply matrices or read device memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\b(?:HGMMA|HMMA|FFMA|LDGSTS|LDG)(?![A-Z])(?:\.\w+)*", text))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    given = parser.parse_args()
    target = GPUTarget("cuda", given.arch, 32)
    seen = set()
    for name in given.names:
        case, variant = name.split("-", 1)
        for kernel, arguments in recorded(partial((CASES | NETWORKS)[case], *VARIANTS[variant]), given.arch):
            source, options = source_of(kernel, arguments, target)
            key = (case, source.name) if given.first else (source.hash(), str(options))
            if key not in seen:
                seen.add(key)
                row, code = compiled(source, options, target)
                if given.instructions:
                    row["instructions"] = sorted(instructions(code))
                print(json.dumps({"case": name, "arch": given.arch} | row), flush=True)


if __name__ == "__main__":
    main()
