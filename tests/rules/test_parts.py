"""Layers of which only the weight, or only the bias, is trained or optimized here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fngd
from architectures import floats
from natural import check, sample_rows
from networks import Transformer

transformers = pytest.importorskip("transformers")

N = 5


class Conv1D(nn.Sequential):
    def __init__(self):
        kind = transformers.pytorch_utils.Conv1D
        super().__init__(kind(5, 4), nn.Tanh(), nn.Linear(5, 3))


def _conv(first, positions):
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(first.out_channels * positions, 3))


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "linear on positions": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (2, 3, 4)),
    "transposed linear": (Conv1D, (2, 4)),
    "conv1d": (lambda: _conv(nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"), 6), (3, 6)),
    "conv2d": (lambda: _conv(nn.Conv2d(2, 4, (3, 2), stride=2, groups=2, padding=1), 9), (2, 5, 4)),
    "conv3d": (lambda: _conv(nn.Conv3d(2, 3, 2, dilation=2), 8), (2, 4, 4, 4)),
    "transposed conv": (
        lambda: _conv(nn.ConvTranspose2d(2, 4, 3, 2, groups=2, padding=1, output_padding=1), 36),
        (2, 3, 3),
    ),
    "attention": (lambda: Transformer(batch_first=True), (3, 4)),
    "attention, time first": (lambda: Transformer(batch_first=False), (3, 4)),
}


def build(kind):
    """Return (model, loss, inputs)."""
    make, shape = KINDS[kind]
    x = floats(N, *shape)

    def loss(net, samples):
        return net(x[list(samples)]).sin().square().flatten(1).sum(1).mean()

    return make().double(), loss, x


def by_end(model, end):
    return {name: p for name, p in model.named_parameters() if name.endswith(end)}


# ---- only the weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_of_another_optimizer_stays_plain_beside_a_weighted_weight(kind):
    model, loss, _ = build(kind)
    weights = by_end(model, "weight")
    coverage = check(model, loss, N, params=weights.values())
    assert coverage.keys() == weights.keys()
    how = {name: text for name, text in coverage.items() if "norm" not in name}
    assert not any(text.startswith("plain") for text in how.values()), how
    assert "bias" not in how.values()


def test_weights_of_biased_layers_go_on_with_their_own_bias_when_it_is_frozen_and_trained_again():
    model, loss, _ = build("linear")
    opt = fngd.FNGD(model, params=by_end(model, "weight").values(), share="none")
    for trained in (False, True):
        for bias in by_end(model, "bias").values():
            bias.requires_grad_(trained).grad = None
        loss(model, range(N)).backward()
        assert (model[0].bias.grad is None) != trained
    twin = copy.deepcopy(model)
    opt.detach()
    twin.zero_grad()
    loss(twin, range(N)).backward()
    torch.testing.assert_close(model[0].bias.grad, twin[0].bias.grad)


@pytest.mark.parametrize("share", ["none", "sample"])
def test_matrices_here_and_biases_with_adamw(share):
    """Both optimizers step; the biases move as AdamW alone would move them."""
    model, loss, _ = build("conv2d")
    opt = fngd.FNGD(model, lr=0.0, params=by_end(model, "weight").values(), share=share)
    twin = copy.deepcopy(model)
    pairs = [(model, torch.optim.AdamW(by_end(model, "bias").values(), lr=0.1))]
    pairs += [(twin, torch.optim.AdamW(by_end(twin, "bias").values(), lr=0.1))]
    for _ in range(3):
        opt.set_samples(range(N))
        for net, rest in pairs:
            net.zero_grad()
            loss(net, range(N)).backward()
            rest.step()
        opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_weights_that_two_layers_share_beside_biases_of_another_optimizer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embedding(ids))).mean(1)

    model, ids = Tied().double(), torch.randint(0, 7, (N, 3))
    coverage = check(
        model,
        lambda net, some: net(ids[list(some)]).sin().square().sum(1).mean(),
        N,
        params=[model.head.weight],
    )
    assert set(coverage.values()) == {"embedding+linear"}


@pytest.mark.parametrize(
    ("model", "shape", "elsewhere", "reason"),
    [
        (nn.LayerNorm(4), (4,), ["bias"], "its bias is not optimized here"),
        (nn.LayerNorm(4), (4,), ["weight"], "its weight is not optimized here"),
        (
            nn.GRU(4, 4, batch_first=True),
            (3, 4),
            ["bias_hh_l0"],
            "some of its parameters are not optimized here",
        ),
        (nn.Bilinear(4, 4, 4), (4,), ["bias"], "some of its parameters are not optimized here"),
    ],
    ids=["norm's bias", "norm's weight", "recurrent", "generic"],
)
def test_layers_without_a_rule_for_a_part_are_plain_and_named(model, shape, elsewhere, reason):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), copy.deepcopy(model)

        def forward(self, x):
            y = self.first(x)
            y = self.layer(*[y] * (2 if isinstance(model, nn.Bilinear) else 1))
            return y[0] if isinstance(y, tuple) else y

    net, x = Around().double(), floats(N, *shape)
    mine = [p for name, p in net.named_parameters() if name not in [f"layer.{each}" for each in elsewhere]]
    coverage = check(
        net,
        lambda net, some: net(x[list(some)]).sin().square().flatten(1).sum(1).mean(),
        N,
        params=mine,
        norms="weighted",
    )
    of_layer = {how for name, how in coverage.items() if name.startswith("layer.")}
    assert of_layer == {f"plain: {reason}"}
    assert not any(f"layer.{each}" in coverage for each in elsewhere)
    assert coverage["first.weight"] == "linear"


def test_parameters_that_do_not_train_do_not_keep_a_module_of_any_kind_from_its_rule():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 2, 3)).double(), floats(N, 4)
    model[1].bias.requires_grad_(False)
    mine = [p for p in model.parameters() if p.requires_grad]
    coverage = check(
        model,
        lambda net, some: net[1](*net[0](x[list(some)]).chunk(2, 1)).square().sum(1).mean(),
        N,
        params=mine,
    )
    assert coverage["1.weight"] == "generic"


def test_the_output_projection_of_an_attention_whose_inputs_are_optimized_elsewhere():
    model, loss, _ = build("attention")
    mine = [p for name, p in model.named_parameters() if "in_proj" not in name]
    coverage = check(model, loss, N, params=mine)
    assert {how for name, how in coverage.items() if "out_proj" in name} == {
        "plain: MultiheadAttention reads its weight without calling it"
    }
    assert coverage["head.weight"] == "linear"


# ---- only the bias


def natural(g):
    """Return (1/N) sum_n v_n g_n, (lam I + K / N) v = 1, of the rows g of one parameter, with damping 0.3."""
    flat = g.flatten(1)
    k = flat @ flat.T / N
    v = torch.linalg.solve(k + 0.3 * k.trace() * torch.eye(N, dtype=k.dtype), k.new_ones(N))
    return torch.tensordot(v, g, dims=1) / N


def freeze_weights(model):
    for p in by_end(model, "weight").values():
        p.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_frozen_layers_are_weighted(kind):
    model, loss, _ = build(kind)
    freeze_weights(model)
    coverage = check(model, loss, N)
    biases = by_end(model, "bias")
    assert {how for name, how in coverage.items() if name in biases and "norm" not in name} == {"bias"}
    assert {how for name, how in coverage.items() if name not in biases and "norm" not in name} == {
        "plain: frozen when the optimizer was made"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_layers_whose_weights_have_another_optimizer_are_weighted(kind):
    model, loss, _ = build(kind)
    biases = {name: p for name, p in by_end(model, "bias").items() if "norm" not in name}
    assert check(model, loss, N, params=biases.values()) == dict.fromkeys(biases, "bias")


def test_a_weight_that_is_trained_later_is_plain_and_says_so():
    model, loss, _ = build("linear")
    freeze_weights(model)
    opt = fngd.FNGD(model, lr=0.0, share="none", normalize="raw", damping=0.3)
    model.requires_grad_(True)
    loss(model, range(N)).backward()
    coverage = opt.coverage()
    assert coverage["0.bias"] == "bias"
    assert coverage["0.weight"] == "plain: frozen when the optimizer was made"
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.detach()
    rows = sample_rows(model, loss, N)
    torch.testing.assert_close(found["0.weight"], rows["0.weight"].mean(0))
    torch.testing.assert_close(found["0.bias"], natural(rows["0.bias"]))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "attention"])
def test_a_weight_that_is_frozen_later_leaves_its_bias_plain_and_says_so(kind):
    model, loss, _ = build(kind)
    opt = fngd.FNGD(model, lr=0.0, share="none", normalize="raw", damping=0.3)
    freeze_weights(model)
    loss(model, range(N)).backward()
    coverage = opt.coverage()
    found = {name: p.grad.clone() for name, p in by_end(model, "bias").items()}
    opt.detach()
    model.zero_grad()
    loss(model, range(N)).backward()
    for name, p in by_end(model, "bias").items():
        torch.testing.assert_close(found[name], p.grad)
        # An attention that is not routed reads its output projection without calling it.
        if "norm" not in name and "out_proj" not in name:
            assert coverage[name] == "plain: its weight is frozen"
    assert set(opt.stats()["fallbacks"]["0" if kind != "attention" else "head"]) == {"its weight is frozen"}


def test_frozen_weights_that_layers_share_leave_their_biases_to_each():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), floats(N, 4)
    model[2].weight = model[0].weight
    freeze_weights(model)
    opt = fngd.FNGD(model, lr=0.0, share="none", normalize="raw", damping=0.3)

    def loss(net, samples):
        return net(x[list(samples)]).square().sum(1).mean()

    loss(model, range(N)).backward()
    assert {opt.coverage()[f"{i}.bias"] for i in (0, 2)} == {"bias"}
    found = {name: p.grad.clone() for name, p in by_end(model, "bias").items()}
    opt.detach()
    for name, g in sample_rows(model, loss, N).items():
        torch.testing.assert_close(found[name], natural(g))


def test_a_bias_that_frozen_layers_share_is_one_block():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), floats(N, 4)
    model[2].bias = model[0].bias
    freeze_weights(model)
    coverage = check(model, lambda net, some: net(x[list(some)]).square().sum(1).mean(), N)
    assert coverage["0.bias"] == coverage["2.bias"] == "bias"


def test_an_embedding_is_not_weighted_when_a_frozen_read_out_shares_its_weight():
    """Of the weight's two uses only one would be, once it is trained."""
    model, ids = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).double(), torch.arange(N)
    model[2].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    opt = fngd.FNGD(model, share="none")
    model.requires_grad_(True)
    model(ids).square().mean().backward()
    found = model[0].weight.grad.clone()
    assert opt.coverage()["0.weight"] == "plain: shares a parameter with 2"
    opt.detach()
    torch.testing.assert_close(found, torch.autograd.grad(model(ids).square().mean(), model[0].weight)[0])


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed conv", "attention"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_hooks_see_the_weighted_gradient_of_a_part(kind, part):
    model, loss, _ = build(kind)
    mine = {name: p for name, p in by_end(model, part).items() if "norm" not in name}
    seen, opt = {}, fngd.FNGD(model, lr=0.0, params=mine.values(), normalize="raw", damping=0.3)
    for step in range(2):
        for name, p in mine.items() if step == 0 else ():
            p.register_hook(lambda g, name=name: seen.setdefault(name, []).append(g.clone()))
        opt.set_samples(range(N))
        model.zero_grad()
        loss(model, range(N)).backward()
        for name, p in mine.items():
            torch.testing.assert_close(seen[name][step], p.grad)
    opt.detach()
    rows = sample_rows(model, loss, N)
    for name, (solved, shared, *_) in seen.items():
        torch.testing.assert_close(solved, natural(rows[name]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shared, solved, rtol=1e-5, atol=1e-6)  # weights in single precision


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed conv", "attention"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_gradient_that_is_differentiated_again_is_exact_where_the_batch_is_solved_for(kind, part):
    model, loss, _ = build(kind)
    mine = {name: p for name, p in by_end(model, part).items() if "norm" not in name}

    def penalty(net):
        own = [dict(net.named_parameters())[name] for name in mine]
        with sdpa_kernel(SDPBackend.MATH):  # the one that torch differentiates twice
            gradients = torch.autograd.grad(loss(net, range(N)), own, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), own)

    expected = penalty(copy.deepcopy(model))
    opt = fngd.FNGD(model, share="none", params=mine.values())
    for found, exact in zip(penalty(model), expected, strict=True):
        torch.testing.assert_close(found, exact)
    reason = "its gradient was asked for with create_graph=True"
    assert all(reason in how for how in opt.coverage().values())


@pytest.mark.parametrize("kind", ["linear on positions", "conv2d", "attention"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_autocast_gives_outputs_of_torchs_dtype_and_near_gradients(kind, part):
    model, loss, x = build(kind)
    model, x = model.float(), x.float()
    mine = {name: p for name, p in by_end(model, part).items() if "norm" not in name}
    truth = {name: g.mean(0) for name, g in sample_rows(copy.deepcopy(model).double(), loss, N).items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).dtype
    # Weights of one.
    opt = fngd.FNGD(model, lr=0.0, damping=1e12, params=mine.values())
    for _ in range(2):
        opt.set_samples(range(N))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == expected
        y.float().sin().square().flatten(1).sum(1).mean().backward()
        for name, p in mine.items():
            assert (p.grad - truth[name]).norm() <= 0.05 * truth[name].norm() + 1e-3, name
    assert not any(how.startswith("plain") for how in opt.coverage().values())


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_gram_matrices_of_what_trains(part):
    model, loss, _ = build("conv2d")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(part))
    grams = fngd.layer_grams(model, lambda: loss(model, range(N)))
    rows = sample_rows(model, loss, N)
    assert grams.keys() == {"0", "3"}
    for name, k in grams.items():
        c = rows[f"{name}.{part}"].flatten(1) / N
        torch.testing.assert_close(k, c @ c.T)


def test_gram_matrices_of_biases_warn_of_nothing(recwarn):
    model, loss, _ = build("linear")
    freeze_weights(model)
    fngd.layer_grams(model, lambda: loss(model, range(N)))
    assert not recwarn.list


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_part_of_a_layer_that_is_called_twice(part):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    model, x = Twice().double(), floats(N, 4)
    mine = by_end(model, part)
    coverage = check(
        model, lambda net, some: net(x[list(some)]).square().sum(1).mean(), N, params=mine.values()
    )
    assert set(coverage.values()) == {"linear" if part == "weight" else "bias"}


def test_strict_takes_frozen_weights_with_trained_biases():
    model, _, _ = build("linear")
    freeze_weights(model)
    fngd.FNGD(model, share="none", strict=True).detach()
    model = nn.Sequential(*model, nn.LayerNorm(3)).double()
    model[3].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"strict.*3: its weight is frozen"):
        fngd.FNGD(model, share="none", strict=True, norms="weighted")


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_gauss_newton_goes_its_own_way_with_single_parameters(part):
    """The step is that of the dense Jacobian."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), floats(8, 4)
    mine = by_end(model, part)
    rho = (model(x).squeeze(1) - 1) / 8**0.5
    rows = [torch.autograd.grad(r, mine.values(), retain_graph=True) for r in rho]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    k = j @ j.T
    k += 0.01 * k.diagonal().mean() * torch.eye(8, dtype=k.dtype)
    d = j.T @ torch.linalg.solve(k, rho.detach())
    before = torch.cat([p.detach().flatten() for p in mine.values()])
    others = {name: p.detach().clone() for name, p in model.named_parameters() if name not in mine}
    fngd.GaussNewton(model, damping=0.01, params=mine.values()).step(lambda: model(x).squeeze(1) - 1)
    after = torch.cat([p.detach().flatten() for p in mine.values()])
    torch.testing.assert_close(before - after, d, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in others.items())


def test_a_rule_of_ones_own_is_not_split():
    """What its forward makes of the bias, nobody else knows."""
    from fngd import rules
    from fngd.rules.linear import LinearRule

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class DoubledRule(LinearRule):
        def forward(self, module, x, coefficients, on_use):
            return 2 * super().forward(module, x, coefficients, on_use)

    table = dict(rules._RULES)
    rules.register(Doubled, DoubledRule())
    try:
        model, x = nn.Sequential(Doubled(4, 3), nn.Linear(3, 2)).double(), floats(N, 4)
        for part, reason in (("weight", "its bias"), ("bias", "its weight")):
            coverage = check(
                model,
                lambda net, some: F.softplus(net(x[list(some)])).sum(1).mean(),
                N,
                params=by_end(model, part).values(),
            )
            assert coverage[f"0.{part}"] == f"plain: {reason} is not optimized here"
    finally:
        rules._RULES.clear()
        rules._RULES.update(table)
