"""Rules of one's own."""

import pytest
import torch
from torch import nn

import fngd
from fngd import rules
from fngd.rules.linear import LinearRule
from fngd_kernels.ops import nodes


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1


class Child(Own):
    pass


class Changed(Own):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(LinearRule):
    def __init__(self, name):
        self.name = name


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def rule_names(*modules):
    coverage = fngd.FNGD(nn.ModuleList(modules)).coverage()
    return [coverage[f"{n}.weight"] for n in range(len(modules))]


def test_subclasses_take_the_rule_of_their_nearest_parent():
    rules.register(Own, Named("own"))
    modules = nn.Linear(2, 2), Own(2, 2), Child(2, 2), Changed(2, 2)
    assert rule_names(*modules) == ["linear", "own", "own", "generic"]
    rules.register(Child, Named("child"))
    rules.register(Own, Named("own again"))
    rules.register(nn.Linear, Named("any linear"))
    assert rule_names(*modules) == ["any linear", "own again", "child", "generic"]


class Scale(nn.Module):
    """y = w x."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, dtype=torch.float64) + 0.5)

    def forward(self, x):
        return x * self.weight


class ScaleRule(rules.Rule):
    """Has the name of a rule of the package, which serves something else."""

    name = "linear"

    def forward(self, module, x, coefficients, on_use):
        return x * nodes.rows(module.weight, len(x), coefficients, on_use)

    def contributions(self, module, uses):
        return torch.stack([use.e for use in uses]).sum(0), None


def test_two_methods_make_a_rule_whatever_its_name():
    rules.register(Scale, ScaleRule())
    model = nn.Sequential(Scale(3), nn.Linear(3, 1).double())
    x = torch.randn(5, 3, dtype=torch.float64)
    jacobian = torch.stack(
        [torch.autograd.grad(model(x[n : n + 1]).sum(), model[0].weight)[0] for n in range(5)]
    )

    k = fngd.layer_grams(model, lambda: model(x).mean())["0"]
    torch.testing.assert_close(k, jacobian @ jacobian.T / 25)

    opt = fngd.FNGD(model, share="none")
    assert opt.coverage()["0.weight"] == "linear"
    model(x).mean().backward()
    v = torch.linalg.solve(
        0.1 * 5 * k.trace() * torch.eye(5, dtype=torch.float64) + 5 * k, torch.ones(5, dtype=torch.float64)
    )
    torch.testing.assert_close(model[0].weight.grad, (v / v.mean()) @ jacobian / 5)
    opt.detach()

    gauss_newton = fngd.GaussNewton(model, damping=0.1)
    found = gauss_newton._linearize(lambda: model(x).squeeze(1))
    gradient = found.by_parameter(found.transposed_times(torch.ones(5, dtype=torch.float64)))
    torch.testing.assert_close(gradient[model[0].weight], jacobian.sum(0) / 5**0.5)


def test_a_rule_of_the_package_may_be_extended():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class DoubledRule(LinearRule):
        def forward(self, module, x, coefficients, on_use):
            return super().forward(module, 2 * x, coefficients, on_use)

    rules.register(Doubled, DoubledRule())
    model = nn.Sequential(Doubled(3, 2, bias=False)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    k = fngd.layer_grams(model, lambda: model(x).sum())["0"]
    torch.testing.assert_close(k, 8 * x @ x.T)
    assert fngd.FNGD(model, share="none").coverage()["0.weight"] == "linear"


def test_what_cannot_be_a_rule():
    for kind in (Own(2, 2), int, "Linear"):
        with pytest.raises(TypeError, match=r"module_type: expected a subclass of torch.nn.Module, got"):
            rules.register(kind, LinearRule())
    with pytest.raises(TypeError, match="rule: expected an object, got the class LinearRule"):
        rules.register(Own, LinearRule)

    class Half:
        def forward(self, module, x, scale, sink):
            return x

    lacking = "Half lacks name, reason_against, batched, gram, contributions, combine"
    with pytest.raises(TypeError, match=lacking):
        rules.register(Own, Half())
    with pytest.raises(ValueError, match="rule: expected a name of its own, got 'generic'"):
        rules.register(Own, Named("generic"))
    assert Own not in rules._RULES
