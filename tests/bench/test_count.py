"""The work of steps, counted without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from paths import ROOT

pytest.importorskip("triton")
KERNELS = """
import json, sys
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction
from unittest import mock
import fngd_kernels as fk
from bench.gpu.meta import launching
from bench.kernels.counting import KernelCounter
from fngd_kernels.ops.registration import OPERATORS

def counted(run, *tensors):
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype) for shape, dtype in tensors]
        counter = KernelCounter()
        with launching(counter.launched, (9, 0)), counter:
            run(*inputs)
    return [
        [k.name, k.algorithm, dict(k.macs), k.moved, k.scratch, k.launches] for k in counter.kernels
    ]

def gradients(forward):
    def run(x, *weights):
        x.requires_grad_()
        weights = [w.requires_grad_() for w in weights]
        y = forward(x, *weights)
        torch.autograd.grad(y, [x, *weights], y.detach())
    return run

def launched(x, *_):
    JITFunction.run(None, X=x)
    return x[0].clone()

def launched_beside_product(a, e, s, bias):
    JITFunction.run(None, A=a)
    return [e.flatten(0, 1).T @ a.flatten(0, 1)]

def combined(a, e, s):
    with mock.patch.dict(OPERATORS, combine=launched_beside_product):
        fk.combine(a, e, s)

def combined_rows(g, s):
    with mock.patch.dict(OPERATORS, combine_rows=launched):
        try:
            fk.combine_rows(g, s)
        except NotImplementedError as error:
            rows["not described"] = str(error)

rows = {}
half, single, ids = torch.bfloat16, torch.float32, torch.int64
rows |= {
    "linear": counted(F.linear, ((4, 8), half), ((16, 8), half), ((16,), half)),
    "conv": counted(
        gradients(lambda x, w: F.conv2d(x, w, padding=1, stride=2)),
        ((2, 3, 8, 8), half), ((5, 3, 3, 3), half),
    ),
    "embedding": counted(F.embedding, ((2, 3), ids), ((1000, 8), single)),
    "in place": counted(lambda x, y: x.add_(y), ((6,), single), ((6,), single)),
    "expanded": counted(lambda x: x.expand(100, 6) + 1, ((6,), single)),
    "copy": counted(lambda x, y: x.copy_(y), ((6,), single), ((6,), half)),
    "views": counted(lambda x: x.view(3, 2).T[0].detach(), ((6,), single)),
    "causal": counted(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *[((2, 3, 16, 8), half)] * 3,
    ),
    "pairs": counted(lambda a, e: fk.gram(a, e), ((128, 30, 512), half), ((128, 30, 512), half)),
    "explicit": counted(lambda a, e: fk.gram(a, e), ((8, 1024, 32), half), ((8, 1024, 32), half)),
    "gram of embedding": counted(
        lambda i, e: fk.gram_embedding(i, e), ((128, 30), ids), ((128, 30, 64), single)
    ),
    "conv with bias": counted(
        lambda x, e, s: fk.combine_conv(x, e, s, (5, 3, 3, 3), padding=1, bias=True),
        ((2, 3, 8, 8), half), ((2, 5, 8, 8), half), ((2,), single),
    ),
}
rows["beside a product"] = counted(combined, ((4, 3, 8), half), ((4, 3, 16), half), ((4,), single))
counted(combined_rows, ((4, 8), half), ((4,), single))
json.dump(rows, sys.stdout)
"""
STEPS = """
import json, sys
from bench.kernels import count
from bench.steps.networks import MIXED

count.NETWORKS.update({name: MIXED[name]["small"] for name in MIXED})
count.main(["--network", *MIXED, "--layers", "--output", sys.argv[1]])
"""
HALF, SINGLE, IDS = 2, 4, 8


def run(program, *arguments):
    """In a process of its own: the tests' kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kernels():
    return json.loads(run(KERNELS))


def test_linear_layer(kernels):
    moved = HALF * (4 * 8 + 16 * 8 + 16 + 4 * 16)
    assert kernels["linear"] == [["addmm", "", {"bf16": 4 * 8 * 16}, moved, 0, 1]]


def test_convolution_and_each_result_of_its_backward(kernels):
    macs, x, w, y = 2 * 5 * 4 * 4 * 3 * 9, 2 * 3 * 64, 5 * 3 * 9, 2 * 5 * 16
    assert kernels["conv"] == [
        ["convolution", "", {"bf16": macs}, HALF * (x + w + y), 0, 1],
        ["convolution_backward", "", {"bf16": macs}, HALF * (y + w + x), 0, 1],
        ["convolution_backward", "", {"bf16": macs}, HALF * (y + x + w), 0, 1],
    ]


def test_bytes_are_those_that_are_touched(kernels):
    names = ("embedding", "in place", "expanded", "copy", "views")
    moved = {name: [row[3] for row in kernels[name]] for name in names}
    assert moved["embedding"] == [6 * IDS + 2 * 6 * 8 * SINGLE]
    assert moved["in place"] == [3 * 6 * SINGLE]
    assert moved["expanded"] == [(6 + 600) * SINGLE]
    assert moved["copy"] == [6 * (HALF + SINGLE)]
    assert moved["views"] == []


def test_attention_is_flash_and_leaves_out_what_is_above_the_diagonal(kernels):
    ((_, _, macs, moved, _, launches),) = kernels["causal"]
    assert macs == {"bf16": 2 * 3 * 16 * 16 * 8}
    assert moved == 4 * 2 * 3 * 16 * 8 * HALF + 2 * 3 * 16 * SINGLE
    assert launches == 1


def test_gram_matrix_by_pairs(kernels):
    pairs, moved = 128 * 129 // 2 * 30**2, HALF * 128 * 30 * 2 * 512 + SINGLE * 128**2
    assert kernels["pairs"] == [["gram", "pairs", {"bf16": pairs * 2 * 512}, moved, 0, 1]]


def test_gram_matrix_by_contributions_writes_and_reads_them(kernels):
    ((_, algorithm, macs, moved, scratch, launches),) = kernels["explicit"]
    assert algorithm == "explicit"
    assert macs == {"bf16": (8 * 1024 + 8 * 9 // 2) * 32 * 32}
    assert moved == HALF * 8 * 1024 * 64 + SINGLE * 8 * 8
    # formed, contracted, summed; two partial sums of K, which the last two of these take
    assert launches == 3
    assert scratch == 2 * 8 * 32 * 32 * HALF + 2 * 2 * 8 * 8 * SINGLE


def test_gram_matrix_of_an_embedding_counts_all_pairs(kernels):
    rows = {row[0]: row for row in kernels["gram of embedding"]}
    _, algorithm, macs, moved, scratch, launches = rows["gram_embedding"]
    assert (algorithm, scratch, launches) == ("pairs of equal ids", 0, 1)
    assert macs == {"tf32": 3 * (128 * 129 // 2 * 30**2 * 64)}  # in three terms
    assert moved == 128 * 30 * (IDS + SINGLE * 64) + SINGLE * 128**2


def test_operator_without_launches_is_the_sum_of_its_parts(kernels):
    rows = {row[0]: row for row in kernels["conv with bias"]}
    x, w, y = 2 * 3 * 64, 5 * 3 * 9, 2 * 5 * 64
    assert rows["scale_bias"][2:4] == [{}, HALF * (2 * y + 5) + SINGLE * 2]
    assert rows["convolution_backward"][2:4] == [{"bf16": y * 27}, HALF * (y + x + w)]
    assert rows["combine_conv"][2:] == [{}, 0, 0, 0]


def test_launches_do_what_products_of_torch_beside_them_do_not(kernels):
    product, launch = kernels["beside a product"]
    assert product[:3] == ["mm", "", {"bf16": 4 * 3 * 8 * 16}]
    assert launch == ["combine", "", {}, HALF * 4 * 3 * 8, 0, 1]


def test_launches_that_nobody_described_are_refused(kernels):
    assert kernels["not described"] == "combine_rows: how many multiply-adds its Triton kernels do"


def test_steps_differ_in_what_solving_adds(tmp_path):
    rows = tmp_path / "rows.jsonl"
    printed = run(STEPS, str(rows))
    assert "FNGD solving / SGD: multiply-adds" in printed
    assert "| conv 3x3/1 3->8 @32" in printed
    assert "| linear T=10 64->192" in printed
    figures = {}
    for row in map(json.loads, rows.read_text().splitlines()):
        assert row["floor_H100_s"] >= row["floor_cached_H100_s"] > 0
        assert row["floor_H100_s"] >= row["floor_H200_s"]
        assert {"commit", "torch", "triton"} <= row.keys()
        figures[row["network"].split()[0], row["step"], row["part"]] = row
    for network in ("ResNet-18,", "Transformer"):
        sgd, solving = (
            {part: row for (name, kind, part), row in figures.items() if (name, kind) == (network, step)}
            for step in ("SGD", "FNGD solving")
        )
        assert solving.keys() - sgd.keys() == {"gram", "solve", "combine"}
        for key in ("macs_bf16", "bytes_moved", "launches"):
            assert solving["forward"][key] == sgd["forward"][key] > 0
        # the gradients of the parameters move from the backward to combine
        moved_on = solving["backward"]["macs_bf16"] + solving["combine"]["macs_bf16"]
        assert moved_on == sgd["backward"]["macs_bf16"]
        layers = {"ResNet-18,": 21, "Transformer": 14}[network]
        assert solving["solve"]["macs_fp32"] == layers * 16**3 // 6
        assert solving["gram"]["launches"] >= layers
