"""Batch normalisation through its rule: torch's outputs and statistics, weighted parameter gradients."""

import copy

import pytest
import torch
from torch import nn

from fngd.rules import rule_for

CASES = {
    "1d-flat": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "1d": (lambda: nn.BatchNorm1d(3, momentum=None), (5, 3, 4)),
    "2d": (lambda: nn.BatchNorm2d(3, eps=1e-2), (5, 3, 4, 2)),
    "2d-no-statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (5, 3, 2, 2, 3)),
}


def pair(case, dtype=torch.float64):
    build, shape = CASES[case]
    module = build().to(dtype)
    with torch.no_grad():
        module.weight.uniform_(0.5, 2)
        module.bias.normal_()
    return module, copy.deepcopy(module), torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_gradients(case):
    module, plain, x = pair(case)
    rule, _ = rule_for(module)
    scale = torch.randn(5, dtype=torch.float64)
    for _ in range(2):  # the cumulative average changes from call to call
        y, expected = rule.forward(module, x, scale, None), plain(x)
        torch.testing.assert_close(y, expected)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)

    e = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, module.weight, module.bias), e)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, e, retain_graph=True)[0])
    weighted = e * scale.view(-1, *[1] * (e.ndim - 1))
    expected_dw, expected_db = torch.autograd.grad(expected, (plain.weight, plain.bias), weighted)
    torch.testing.assert_close(dw, expected_dw)
    torch.testing.assert_close(db, expected_db)


@pytest.mark.parametrize("case", CASES)
def test_it_is_differentiable_twice(case):
    module, plain, x = pair(case)
    rule, _ = rule_for(module)
    ones = torch.ones(5, dtype=torch.float64)

    def penalty(y, parameters):
        dx, dw = torch.autograd.grad(y.sin().sum(), (x, parameters[0]), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, *parameters))

    actual = penalty(rule.forward(module, x, ones, None), (module.weight, module.bias))
    expected = penalty(plain(x), (plain.weight, plain.bias))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_images_in_both_layouts(memory_format, dtype):
    module, plain, x = pair("2d", torch.float32)
    x = x.detach().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    rule, _ = rule_for(module)
    y, expected = rule.forward(module, x, torch.ones(5), None), plain(x)
    assert y.dtype == expected.dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, expected)
    e = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, module.weight, module.bias), e)
    for a, b in zip(actual, torch.autograd.grad(expected, (x, plain.weight, plain.bias), e), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)
