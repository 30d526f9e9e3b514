"""Models with parameters of other kinds than real numbers in memory: complex, whole numbers, none yet."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
from architectures import floats
from natural import check

N = 5


class Complex(nn.Module):
    """Complex numbers of real ones."""

    def forward(self, x):
        return torch.complex(x, x.sin())


class Parts(nn.Module):
    """Real and imaginary parts, side by side."""

    def forward(self, x):
        return torch.view_as_real(x).flatten(1)


class Filter(nn.Module):
    """Complex and real parameters of one module."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=x.shape[-1]) * self.scale


COMPLEX = {
    "linear": (lambda: [Complex(), nn.Linear(4, 3, dtype=torch.complex128), Parts()], (4,), 6),
    "conv": (lambda: [Complex(), nn.Conv1d(2, 3, 2, dtype=torch.complex128), Parts()], (2, 4), 18),
    "transposed conv": (
        lambda: [Complex(), nn.ConvTranspose1d(2, 1, 2, dtype=torch.complex128), Parts()],
        (2, 4),
        10,
    ),
    "any module": (lambda: [Filter()], (4,), 4),
    "without bias": (
        lambda: [Complex(), nn.Linear(4, 2, bias=False, dtype=torch.complex128), Parts()],
        (4,),
        4,
    ),
}


def around(kind):
    """Return (model, inputs): complex parameters between real ones."""
    middle, shape, features = COMPLEX[kind]
    first = nn.Linear(shape[-1], shape[-1]).double()
    return nn.Sequential(first, *middle(), nn.Linear(features, 2).double()), floats(N, *shape)


@pytest.mark.parametrize("kind", COMPLEX)
def test_complex_parameters_are_plain_and_named(kind):
    model, x = around(kind)
    coverage = check(model, lambda net, some: net(x[list(some)]).square().sum(1).mean(), N)
    of_complex = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.is_complex()}
    assert of_complex
    for name, how in coverage.items():
        module = name.rpartition(".")[0]
        assert how == ("plain: complex parameters" if module in of_complex else "linear"), name


@pytest.mark.parametrize("base", ["sgd", "adamw", torch.optim.Adagrad])
@pytest.mark.parametrize("kind", COMPLEX)
def test_steps_on_complex_parameters_are_the_base_optimizers(kind, base):
    model, x = around(kind)
    twin = copy.deepcopy(model)
    alone = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.get(base, base)
    # Weights of one.
    opt, other = (
        fngd.FNGD(model, 0.1, base=base, share="none", damping=1e12),
        alone(twin.parameters(), lr=0.1),
    )
    for _ in range(2):
        for net, optimizer in ((model, opt), (twin, other)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [complex("inf"), complex(0, float("nan"))])
@pytest.mark.parametrize("form", ["dense", "conjugated", "sparse"])
def test_a_step_whose_complex_gradient_is_not_finite_is_left_out(value, form):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, dtype=torch.complex128))
    opt = fngd.FNGD(model, lr=0.1, share="none")
    before = copy.deepcopy(list(model.parameters()))
    for finite in (False, True):
        gradient = torch.zeros(2, 4, dtype=torch.complex128)
        gradient[1, 2] = 1 if finite else value
        model[1].weight.grad = {
            "dense": lambda g: g,
            "conjugated": lambda g: g.conj(),
            "sparse": lambda g: g.to_sparse(),
        }[form](gradient)
        opt.step()
        assert opt.stats()["skipped_steps"] == 1
        unchanged = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert unchanged == [True, True, finite is False, True]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_frozen_parameters_of_other_dtypes_disturb_nothing(dtype, base):
    class Quantized(nn.Linear):
        def __init__(self):
            super().__init__(4, 3, dtype=torch.float64)
            self.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.double(), self.bias)

    model, x = nn.Sequential(nn.Linear(4, 4).double(), Quantized(), nn.Linear(3, 2).double()), floats(N, 4)
    frozen = model[1].weight.detach().clone().double()
    opt = fngd.FNGD(model, lr=0.1, base=base)
    for _ in range(3):
        opt.set_samples(range(N))
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.stats()["skipped_steps"] == 0
    assert opt.coverage()["0.weight"] == "linear"
    assert opt.coverage()["1.bias"].startswith("plain: ")
    assert torch.equal(model[1].weight.double(), frozen)


MAKE = {
    "FNGD": fngd.FNGD,
    "GaussNewton": fngd.GaussNewton,
    "layer_grams": lambda model: fngd.layer_grams(model, lambda: torch.zeros(())),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize(
    ("layers", "shape", "named"),
    [
        (lambda: [nn.LazyLinear(3)], (4,), "0.weight of a LazyLinear"),
        (lambda: [nn.Linear(4, 5), nn.LazyLinear(3)], (4,), "1.weight of a LazyLinear"),
        (lambda: [nn.LazyConv1d(3, 2), nn.LazyBatchNorm1d()], (2, 4), "0.weight of a LazyConv1d"),
    ],
    ids=["linear", "second", "conv and norm"],
)
def test_lazy_modules_are_refused_before_their_first_batch(make, layers, shape, named):
    model = nn.Sequential(*layers())
    with pytest.raises(
        ValueError, match=f"^model: {named} is not initialized; run a batch through the model first"
    ):
        make(model)
    x = torch.randn(N, *shape)
    model(x)
    opt = fngd.FNGD(model, share="none")
    model(x).square().mean().backward()
    opt.step()
    assert not any("no part" in how for how in opt.coverage().values())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_parameters_on_the_meta_device_are_refused_by_name(make):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[1].to("meta")
    with pytest.raises(
        ValueError, match=r"^model: 1\.weight is on the meta device and has no values; materialise"
    ):
        make(model)
    assert "forward" not in model[0].__dict__
    if make is not MAKE["layer_grams"]:
        assert make(model, params=model[0].parameters()).coverage().keys() == {"0.weight", "0.bias"}
    model[1].to_empty(device="cpu")
    with torch.no_grad():
        for p in model[1].parameters():
            p.zero_()
    assert fngd.FNGD(model).coverage()["1.weight"] == "linear"


def test_gauss_newton_refuses_complex_parameters_by_name():
    model = nn.Sequential(nn.Linear(4, 4).double(), Filter(), nn.Linear(4, 1).double())
    message = r"^params: expected real ones, got the complex parameter 1\.filter, of shape \(3,\)$"
    for params in (None, model.named_parameters(), [{"params": [model[1].filter]}]):
        with pytest.raises(TypeError, match=message):
            fngd.GaussNewton(model, params=params)
    real = [p for p in model.parameters() if not p.is_complex()]
    opt = fngd.GaussNewton(model, params=real)
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [model[1].filter]})
    with pytest.raises(TypeError, match="the complex parameter outside of the model, of shape"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones((), dtype=torch.complex128))]})
    x = floats(8, 4)
    before = opt.step(lambda: model(x) - 1)
    assert opt.step(lambda: model(x) - 1) < before
    assert len(opt.param_groups) == 1
