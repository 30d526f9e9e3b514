"""nn.MultiheadAttention routed through FNGD: outputs and gradients are torch's own."""

import copy
import math

import pytest
import torch
from torch import nn

import fngd

N, T, S, D, HEADS = 3, 4, 5, 6, 2


def attention(**options):
    return nn.MultiheadAttention(D, HEADS, **options).double()


def inputs(kind, batch_first):
    query, key, value = (torch.randn(N, t, D, dtype=torch.float64, requires_grad=True) for t in (T, S, S))
    chosen = {"self": (query, query, query), "cross": (query, key, key), "three": (query, key, value)}[kind]
    if batch_first:
        return chosen
    moved = {id(x): x.transpose(0, 1) for x in chosen}
    return tuple(moved[id(x)] for x in chosen)


def masks(kind, name):
    keys = T if kind == "self" else S
    padding = torch.zeros(N, keys, dtype=torch.bool)
    padding[0, -1] = True
    causal = torch.ones(T, keys, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal},
        "both": {"key_padding_mask": padding, "attn_mask": causal},
        "added": {"attn_mask": torch.randn(N * HEADS, T, keys).double()},
        "hint": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T).double(), "is_causal": True},
    }[name]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both", "added", "hint"])
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_outputs_and_gradients_are_torchs_own(kind, mask, batch_first, need_weights):
    if mask == "hint" and kind != "self":
        pytest.skip("a square mask")
    plain = attention(batch_first=batch_first, bias=kind != "three")
    routed = copy.deepcopy(plain)
    # With much damping every sample weighs the same.
    opt = fngd.FNGD(routed, share="none", damping=1e12)
    options = {"need_weights": need_weights, "average_attn_weights": mask != "padding", **masks(kind, mask)}
    x = inputs(kind, batch_first)
    results = [module(*x, **options) for module in (plain, routed)]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(results[0][0])
    gradients = []
    for y, module in zip(results, (plain, routed), strict=True):
        gradients.append(torch.autograd.grad(y[0], set(x), direction, retain_graph=True))
        y[0].backward(direction)
        gradients[-1] += tuple(p.grad for p in module.parameters())
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert set(opt.coverage().values()) == {"attention", "linear"}


def test_dropout_draws_the_same_numbers():
    plain = attention(dropout=0.5, batch_first=True)
    routed = copy.deepcopy(plain)
    opt = fngd.FNGD(routed, share="none")
    x = torch.randn(N, T, D, dtype=torch.float64)
    for need_weights in (False, True):
        outputs = []
        for module in (plain, routed):
            torch.manual_seed(1)
            outputs.append(module(x, x, x, need_weights=need_weights)[0])
        torch.testing.assert_close(*outputs)
    assert opt.stats()["solved_batches"] == 0


@pytest.mark.parametrize("options", [{"kdim": 3, "vdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_other_forms_keep_the_plain_gradient_and_say_so(options):
    model = nn.ModuleDict({"first": nn.Linear(D, D), "attention": nn.MultiheadAttention(D, HEADS, **options)})
    covered = fngd.FNGD(model, share="none").coverage()
    assert covered["first.weight"] == "linear"
    assert all(how.startswith("plain: Multi") for name, how in covered.items() if "attention" in name)


def test_evaluation_and_unbatched_calls_are_torchs_own():
    module = attention(batch_first=True)
    opt = fngd.FNGD(module, share="none")
    x = torch.randn(T, D, dtype=torch.float64)
    y, weights = module(x, x, x)
    assert (y.shape, weights.shape) == ((T, D), (T, T))
    with torch.no_grad():
        torch.testing.assert_close(module(x[None], x[None], x[None])[0][0], y)
    with pytest.raises(ValueError, match="attn_mask: expected the causal mask"):
        module(x[None], x[None], x[None], is_causal=True)
    opt.detach()
    assert "forward" not in module.__dict__
    assert math.isfinite(float(y.sum()))
