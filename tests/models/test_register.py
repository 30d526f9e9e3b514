"""Rules of one's own."""

import pytest
from torch import nn

import fngd
from fngd import rules
from fngd.rules.linear import LinearRule


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
