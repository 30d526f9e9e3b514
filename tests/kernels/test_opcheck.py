import pytest
import torch
from torch.utils._pytree import tree_map_only

import fngd_kernels as fk

A, E = torch.randn(5, 3, 4), torch.randn(5, 3, 6)
X, Y = torch.randn(5, 4, 6, 7), torch.randn(5, 6, 3, 7)
IDS, S = torch.randint(9, (5, 3)), torch.randn(5)
CONV = ((6, 2, 3, 3), (2, 1), (1, 1), (1, 1), 2)

CALLS = [
    ("gram", (A, E, True, 1 << 20)),
    ("gram", (A[:, 0].bfloat16(), E[:, 0].bfloat16(), False, 1 << 20)),
    ("gram", (A[:0], E[:0], False, 0)),
    ("gram_batch", ([A, A + 1], [E, E + 1], True, 1 << 20)),
    ("gram_conv", (X, Y, *CONV, True, 1 << 20)),
    ("gram_conv", (X.double(), Y.double(), *CONV, False, 0)),
    ("gram_embedding", (IDS, E, 3, 1 << 20)),
    ("gram_embedding", (IDS[:, 0], E[:, 0], None, 1 << 20)),
    ("gram_rows", (A, 1 << 20)),
    ("gram_diag", (A, E, True, 1 << 20)),
    ("gram_conv_diag", (X, Y, *CONV, True, 1 << 20)),
    ("gram_embedding_diag", (IDS, E, 3, 1 << 20)),
    ("gram_rows_diag", (A, 1 << 20)),
    ("sketch", (A, 1, 3, 5, True)),
    ("sketch", (X.flatten(2).mT.bfloat16(), 2, 1, 5, False)),
    ("sketch", (A[:0], 1, 3, 5, True)),
    ("combine", (A, E, S, True)),
    ("combine", (A[:, 0].half(), E[:, 0].half(), S, False)),
    ("combine_conv", (X, Y, S, *CONV, True)),
    ("combine_conv", (X.to(memory_format=torch.channels_last), Y, S, *CONV, False)),
    ("combine_embedding", (IDS, E, S, 9, 2)),
    ("combine_rows", (A, S)),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.fngd, name).default, arguments)


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_fake_has_the_dtype_and_strides_of_the_result(name, arguments):
    op = getattr(torch.ops.fngd, name).default
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fakes = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    results = op(*arguments)
    if isinstance(results, torch.Tensor):
        results, fakes = [results], [fakes]
    assert len(results) == len(fakes)
    for result, fake in zip(results, fakes, strict=True):
        assert (result.dtype, result.shape, result.stride()) == (fake.dtype, fake.shape, fake.stride())


def test_public_functions_compile_to_one_graph():
    def step(a, e, x, y, ids, s):
        k = fk.gram(a, e, bias=True) + fk.gram_conv(x, y, (6, 2, 3, 3), stride=(2, 1), padding=1, groups=2)
        k = k + fk.gram_embedding(ids, e) + fk.gram_rows(a)
        weight, bias = fk.combine(a, e, s, bias=True)
        return k, weight, bias, fk.combine_rows(a, s)

    arguments = (A, E, X, Y, IDS, S)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(actual, expected)
