"""Complex residuals count as pairs of real ones; the loss is the mean of their squared absolute values."""

import pytest
import torch
from least_squares import N, dense_step, flat, mlp, points
from torch.func import functional_call

import fngd


def schroedinger_like():
    """A network with real and imaginary part, residuals i u_t + u_xx of u = v + i w."""
    model, x = mlp(2, 8, 2), points(N, 2)

    def residuals():
        z = x.clone().requires_grad_()
        v, w = model(z).unbind(1)
        (dv,) = torch.autograd.grad(v.sum(), z, create_graph=True)
        (dw,) = torch.autograd.grad(w.sum(), z, create_graph=True)
        (vxx,) = torch.autograd.grad(dv[:, 0].sum(), z, create_graph=True)
        (wxx,) = torch.autograd.grad(dw[:, 0].sum(), z, create_graph=True)
        return torch.complex(vxx[:, 0] - dw[:, 1], wxx[:, 0] + dv[:, 1]) - 1j

    return model, residuals


@pytest.mark.parametrize("components", [1, 2])
def test_complex_residuals_are_pairs(components):
    torch.manual_seed(0)
    model, one = schroedinger_like()

    def residuals():
        return one() if components == 1 else torch.stack([one(), 2 * one()], 1)

    def pairs():  # the mean over N C complex numbers is half the sum's mean over 2 N C real ones
        values = residuals()
        return {"pairs": (torch.cat([values.real.flatten(), values.imag.flatten()]), 2.0)}

    parameters = list(model.parameters())
    expected = dense_step(pairs, parameters, 0.1)
    mean = residuals().detach().abs().square().mean()
    before = flat(parameters)
    opt = fngd.GaussNewton(model, damping=0.1)
    loss = opt.step(lambda: {"equation": residuals()})
    assert float((before - flat(parameters) - expected).norm() / expected.norm()) < 1e-8
    assert float(loss) == pytest.approx(float(mean), rel=1e-12)
    assert opt.coverage()["0.weight"] == "linear"


def test_a_function_of_one_sample_may_be_complex():
    torch.manual_seed(0)
    model, x = mlp(2, 6, 2), points(N, 2)

    def residuals():
        v, w = model(x).unbind(1)
        return torch.complex(v, w) ** 2 - 1j

    def residual(params, z):
        v, w = functional_call(model, params, (z,)).unbind(0)
        return torch.complex(v, w) ** 2 - 1j

    parameters = list(model.parameters())
    expected = dense_step(lambda: {"r": (torch.view_as_real(residuals()), 2.0)}, parameters, 0.1)
    before = flat(parameters)
    fngd.GaussNewton(model, damping=0.1).step(lambda: fngd.PerSample(residual, x))
    assert float((before - flat(parameters) - expected).norm() / expected.norm()) < 1e-8
