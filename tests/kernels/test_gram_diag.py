"""Squared norms of the contributions against float64 gradients per sample."""

import pytest
import torch
from test_gram import CONV, LINEAR, TOLERANCE, WORKSPACES, conv_case, linear_case

import fngd_kernels as fk
import oracles


def assert_norms(norms, rows, dtype):
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert oracles.relative_error(norms, rows.square().sum(1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LINEAR)
def test_linear(shape, bias, dtype, workspace):
    a, e = linear_case(*shape, dtype)
    norms = fk.gram(a, e, bias=bias, diag=True, workspace=workspace)
    assert_norms(norms, oracles.linear_rows(a, e, bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), CONV)
def test_conv(x_shape, weight_shape, geometry, bias, dtype):
    x, e = conv_case(x_shape, weight_shape, geometry, dtype)
    norms = fk.gram_conv(x, e, weight_shape, **geometry, bias=bias, diag=True, workspace=20_000)
    assert_norms(norms, oracles.conv_rows(x, e, weight_shape, bias, **geometry), dtype)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("positions", [(), (1,), (9,)])
def test_embedding(positions, padding_idx, workspace):
    ids, e = torch.randint(5, (7, *positions)), torch.randn(7, *positions, 3)
    norms = fk.gram_embedding(ids, e, padding_idx=padding_idx, diag=True, workspace=workspace)
    assert_norms(norms, oracles.embedding_rows(ids, e, 5, padding_idx), torch.float32)


def test_rows_and_empty_batches():
    g = torch.randn(6, 3, 2)
    assert_norms(fk.gram_rows(g, diag=True), g.double().flatten(1), torch.float32)
    assert fk.gram_rows(g[:0], diag=True).shape == (0,)
    assert fk.gram(g[:0], g[:0], diag=True).shape == (0,)
    assert torch.equal(fk.gram(g[:, :0], g[:, :0], diag=True), torch.zeros(6))
