"""Training steps on hard batches: the float64 natural gradient, or a fallback that is counted; never a NaN.

The oracle takes every sample's gradient with autograd in float64, forms K = C C^T of each layer and solves
(K + damping tr(K) I) v = 1. Condition numbers are at most 1 + 1 / damping, so that a gradient computed at
roundoff u is held against 100 u / damping, relative to sum_n |s_n| |C_n|; 100 is about what a contribution
of these networks collects in roundings.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric_cases import UNIT, Worst
from torch.nn import functional as F

import fngd
from fngd_kernels.ops.coefficients import NORMALIZATIONS
from networks import blocks, make

KINDS = (
    "random batch",
    "duplicate samples",
    "near-parallel samples",
    "constant inputs",
    "one dominating sample",
    "samples of size 1e-6 to 1e6",
    "some samples without gradient",
    "no gradient at all",
    "NaN in a sample",
    "infinity in a sample",
)
NETWORKS = ("mlp", "conv2d-groups-reflect", "sequence")
fewer = settings(max_examples=max(60, settings.default.max_examples // 4))


def batch(kind, network, n, dtype, seed):
    """Return the network, inputs, labels and the weight of every sample's loss."""
    torch.manual_seed(seed)
    model, x, y = make(network, n, dtype)
    size = torch.ones(n, dtype=dtype)
    chosen = seed % n
    if kind == "duplicate samples":
        of = torch.randint((n + 1) // 2, (n,))
        x, y = x[of], y[of]
    elif kind == "near-parallel samples":
        first = x[:1].expand_as(x)
        x, y = first + 1e-4 * x if x.is_floating_point() else first, y[:1].expand(n)
    elif kind == "constant inputs":
        x = torch.ones_like(x)
    elif kind == "one dominating sample":
        size[chosen] = 1e6
    elif kind == "samples of size 1e-6 to 1e6":
        size = 10 ** torch.empty(n, dtype=dtype).uniform_(-6, 6)
    elif kind == "some samples without gradient":
        size[: (n + 1) // 2] = 0
    elif kind == "no gradient at all":
        size.zero_()
    elif "in a sample" in kind:
        size[chosen] = math.nan if kind[0] == "N" else math.inf
    return model, x, y, size


def loss_of(model, x, y, size, scale):
    return scale * (size * F.cross_entropy(model(x), y, reduction="none")).mean()


def contributions(model, x, y, size, scale):
    """Return {layer: C (N,D)} in float64, one backward a sample."""
    model, size, n = copy.deepcopy(model).double(), size.double(), len(x)
    x = x.double() if x.is_floating_point() else x
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(
            loss_of(model, x[i : i + 1], y[i : i + 1], size[i : i + 1], scale / n), parameters
        )
        for i in range(n)
    ]
    stacked = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return blocks(model, stacked)


def natural_weights(c, damping):
    k = c @ c.T
    v = torch.linalg.solve(k / k.trace() + damping * torch.eye(len(k)).double(), torch.ones(len(k)).double())
    return v / v.mean()


def check_gradients(worst, name, model, expected, damping, dtype):
    """Require the natural or the plain gradient of every layer; return how many are plain."""
    gradients = blocks(model, {name: p.grad[None] for name, p in model.named_parameters()})
    plain = 0
    for layer, c in expected.items():
        gradient, sizes = gradients[layer][0].double(), c.norm(dim=1)
        if sizes.sum() > 0:
            s = natural_weights(c, damping)
            error, size = (gradient - s @ c).norm(), s.abs() @ sizes
            if error <= 100 * UNIT[dtype] / damping * size:
                worst.see(name, error, 100 * UNIT[dtype] / damping * size)
                continue
        plain += 1
        rounding = 100 * UNIT[dtype] * sizes.sum() + gradient.numel() * torch.finfo(dtype).tiny
        assert (gradient - c.sum(0)).norm() <= rounding
    return plain


@pytest.mark.parametrize("share", ["none", "sample"])
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_on_hard_batches(network, share, tally):
    worst = Worst()

    @fewer
    @given(
        st.sampled_from(KINDS),
        st.sampled_from((torch.float32, torch.float64)),
        st.sampled_from((1, 2, 3, 8)),
        st.one_of(st.just(0), st.integers(-20, 20)),
        st.sampled_from((0.1, 1e-3)),
        st.sampled_from(("sgd", "adamw")),
        st.integers(0, 2**31),
    )
    def check(kind, dtype, n, exponent, damping, base, seed):
        model, x, y, size = batch(kind, network, n, dtype, seed)
        scale = 10.0**exponent
        expected = contributions(model, x, y, size, scale)
        opt = fngd.FNGD(
            model, lr=0.1, base=base, share=share, damping=damping, norms="weighted", weight_decay=0.0
        )
        outcomes = set()
        # A step that solves, and one that reuses its weights, which a table keeps in float32.
        for precision in (dtype, torch.float32)[: 1 + (share == "sample")]:
            opt.zero_grad()
            if share == "sample":
                opt.set_samples(range(n))
            loss_of(model, x, y, size, scale).backward()
            before = [p.detach().clone() for p in model.parameters()]
            if all(p.grad.isfinite().all() for p in model.parameters()):
                assert size.isfinite().all()
                name = f"FNGD, {network}, share={share}, {precision}"
                plain = check_gradients(worst, name, model, expected, damping, precision)
                stats = opt.stats()
                assert stats["failed_solves"] + stats["zero_grams"] >= plain
                outcomes.add("plain gradient in some layers, counted" if plain else "natural gradient")
            else:
                assert not size.isfinite().all()
                opt.step()
                assert opt.stats()["skipped_steps"] == 1
                assert all(map(torch.equal, before, model.parameters()))
                outcomes.add("step left out, counted")
                break
        opt.step()
        assert all(p.isfinite().all() for p in model.parameters())
        (outcome,) = outcomes
        tally("FNGD steps", kind, outcome)

    check()
    worst.report(tally)


@pytest.mark.parametrize("network", ["mlp", "conv2d-groups-reflect"])
def test_inputs_of_any_size_in_every_precision(network, tally):
    @fewer
    @given(
        st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        st.sampled_from((1, 2, 8)),
        st.integers(-20, 20),
        st.sampled_from((1.0, 65536.0)),
        st.sampled_from(NORMALIZATIONS),
        st.integers(0, 2**31),
    )
    def check(dtype, n, exponent, scale, normalize, seed):
        half = dtype.itemsize == 2
        torch.manual_seed(seed)
        model, x, y = make(network, n, torch.float32 if half else dtype)
        x = x * 10.0**exponent
        plain = copy.deepcopy(model)
        opt = fngd.FNGD(model, lr=0.1, share="none", normalize=normalize)
        given = f"inputs of size 1e-20 to 1e20, {'autocast ' * half}{dtype}".replace("torch.", "")
        for step in range(3):
            opt.zero_grad()
            for net in (plain, model) if step == 0 else (model,):
                with torch.autocast("cpu", dtype, enabled=half):
                    loss = scale * F.cross_entropy(net(x), y)
                loss.backward()
            finite = all(p.grad.isfinite().all() for p in model.parameters())
            # In float16 a weight above 1 may be what makes an output's gradient exceed 65504.
            if step == 0 and dtype != torch.float16:
                assert finite or not all(p.grad.isfinite().all() for p in plain.parameters())
            before = [p.detach().clone() for p in model.parameters()]
            skipped = opt.stats()["skipped_steps"]
            opt.step()
            assert opt.stats()["skipped_steps"] == skipped + (not finite)
            assert finite or all(map(torch.equal, before, model.parameters()))
            assert all(p.isfinite().all() for p in model.parameters())
            tally("FNGD steps", given, "finite" if finite else "step left out, counted")

    check()


def test_a_batch_whose_labels_are_all_ignored(tally):
    model, x, _ = make("mlp", 8, torch.float32)
    opt = fngd.FNGD(model, share="none")
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(x), torch.full((8,), -100)).backward()  # 0 / 0
    opt.step()
    stats = opt.stats()
    assert stats["skipped_steps"] + stats["zero_grams"] > 0
    assert all(map(torch.equal, before, model.parameters()))
    tally("FNGD steps", "all labels ignored", "no parameter changed, counted")
