"""Routing belongs to the module that is called: copies, wrappers and tracers see the module as it is."""

import copy
import functools
import inspect
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fngd
from architectures import floats, mlp

N = 6


REGISTER = {}


class Scale(nn.Module):
    """A module of one's own; its subclasses need an argument, and are kept in a register."""

    def __init_subclass__(cls, /, key, **options):
        super().__init_subclass__(**options)
        REGISTER[key] = cls

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, pixels, labels=None):
        return pixels * self.scale


def replica(module):
    return module._replicate_for_data_parallel()


def clone(module):
    """A copy of the dictionary, as meta-learning packages make it."""
    new = module.__new__(type(module))
    new.__dict__ = module.__dict__.copy()
    return new


@pytest.mark.parametrize("make", [copy.copy, replica, clone])
@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), Scale], ids=["linear", "generic"])
def test_copies_that_share_the_dictionary_use_their_own_weights(make, build):
    model = build().double()
    opt = fngd.FNGD(model, share="none")
    other = make(model)
    zeros = {name: nn.Parameter(torch.zeros_like(p)) for name, p in model.named_parameters()}
    other.__dict__["_parameters"] = zeros
    for name in zeros:
        other.__dict__.pop(name, None)
    y = other(floats(N, 4))
    assert not y.any()
    y.square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    model(floats(N, 4)).square().mean().backward()
    assert opt.stats()["solved_batches"] == 1


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_are_of_the_modules_own_class(make):
    model = nn.Linear(4, 4)
    fngd.FNGD(model, share="none")
    other = make(model)
    assert type(other) is nn.Linear
    assert vars(other).keys() == vars(nn.Linear(4, 4)).keys()


def test_nothing_of_this_package_is_pickled():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fngd.FNGD(model, share="none")
    assert b"fngd" not in pickle.dumps(model)


def test_a_routed_module_looks_as_before():
    model = Scale()
    before, signature, source = (
        repr(model),
        inspect.signature(model.forward),
        inspect.getsource(model.forward),
    )
    opt = fngd.FNGD(model, share="none")
    kind = type(model)
    assert isinstance(model, Scale)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Scale", "Scale", __name__)
    assert (repr(model), inspect.signature(model.forward)) == (before, signature)
    assert inspect.getsource(model.forward) == source
    assert REGISTER == {}
    opt.detach()
    assert type(model) is Scale


WRAPPERS = {
    "partial": lambda forward: functools.partial(forward),
    "closure": lambda forward: lambda *args: forward(*args),
    "autocast": lambda forward: torch.autocast("cpu", enabled=False)(forward),
    "compiled": lambda forward: torch.compile(forward, backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_detach_and_attach_reach_behind_wrappers(name):
    model, x = mlp(4, 5, 3), floats(N, 4)
    opt = fngd.FNGD(model, share="none")
    for layer in (model[0], model[2]):
        layer.forward = WRAPPERS[name](layer.forward)
    plain = [
        p.detach() for p in torch.autograd.grad(copy_of(model)(x).square().mean(), list(model.parameters()))
    ]

    def gradients():
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad for p in model.parameters()]

    natural = gradients()
    assert set(opt.coverage().values()) == {"linear"}
    opt.detach()
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)
    opt.attach()
    for found, expected in zip(gradients(), natural, strict=True):
        torch.testing.assert_close(found, expected)


def copy_of(model):
    """A plain function with the model's parameters."""
    first, last = model[0], model[2]
    return lambda x: F.linear(torch.tanh(F.linear(x, first.weight, first.bias)), last.weight, last.bias)


def test_a_forward_that_was_replaced_is_named():
    model, x = mlp(4, 5, 3), floats(N, 4)
    opt = fngd.FNGD(model, share="none")
    model[0].forward = types.MethodType(nn.Linear.forward, model[0])
    model(x).square().mean().backward()
    assert opt.coverage()["0.weight"] == "plain: its forward was replaced since the optimizer was made"
    assert opt.coverage()["2.weight"] == "linear"


def test_the_reasons_are_given_where_all_forwards_were_replaced():
    model = nn.Linear(4, 3)
    model.forward = lambda x: F.linear(x, model.weight)
    with pytest.raises(ValueError, match=r"the model itself: its forward was replaced on the instance"):
        fngd.FNGD(model)


def test_layers_that_another_optimizer_took_over_are_named():
    model, x = mlp(4, 5, 3), floats(N, 4)
    first = fngd.FNGD(model, share="none")
    with pytest.warns(UserWarning, match="another FNGD"):
        second = fngd.FNGD(model, share="none")
    model(x).square().mean().backward()
    assert set(first.coverage().values()) == {"plain: its calls go to another optimizer, or to none"}
    assert set(second.coverage().values()) == {"linear"}


def test_keyword_arguments_go_through():
    model, x = nn.ConvTranspose1d(2, 3, 2, stride=2).double(), floats(N, 2, 4)
    opt = fngd.FNGD(model, share="none")
    for call in (
        lambda: model(input=x, output_size=[9]),
        lambda: model(x, [9]),
        lambda: model(x, output_size=[9]),
    ):
        assert call().shape[-1] == 9
        call().square().mean().backward()
    assert opt.stats()["fallbacks"] == {}
    with pytest.raises(TypeError):
        model(x, size=9)
    with pytest.raises(TypeError):
        model()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_torch_jit_sees_torchs_own_operators(training):
    model, x = mlp(4, 5, 3).train(training), floats(N, 4)
    fngd.FNGD(model, share="none")
    for compiled in (torch.jit.trace(model, x), torch.jit.script(model)):
        torch.testing.assert_close(compiled(x[:2]), copy_of(model)(x[:2]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_torchs_own_operators(strict):
    model, x = mlp(4, 5, 3), floats(N, 4)
    opt = fngd.FNGD(model)
    opt.set_samples(range(N))
    model(x).square().mean().backward()
    opt.step()
    opt.set_samples(range(N))
    program = torch.export.export(model, (x,), strict=strict)
    assert not any("fngd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


def test_fx_traces_a_module_of_its_own():
    model, x = Scale().double(), floats(N, 4)
    fngd.FNGD(model, share="none")
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x, None), model(x))
    linear = nn.Linear(4, 3).double()
    fngd.FNGD(linear, share="none")
    torch.testing.assert_close(torch.fx.symbolic_trace(linear)(x), linear(x))
