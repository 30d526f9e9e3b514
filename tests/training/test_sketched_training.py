"""FNGD and layer_grams with sketched Gram matrices."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
import fngd_kernels as fk
import oracles
from fngd.rules.generic import module as generic_module
from fngd_kernels.sketch import INPUTS, OUTPUTS
from networks import NETWORKS, blocks, make, sample_gradients

N = 5


def grams(model, x, y, sketch):
    return fngd.layer_grams(model, lambda: F.cross_entropy(model(x), y), sketch=sketch)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_rule_is_right_in_expectation_and_exact_where_a_sketch_has_room(network):
    model, x, y = make(network, N)
    exact = grams(model, x, y, None)
    for name, k in grams(model, x, y, 1000).items():
        assert torch.equal(k, exact[name])
    seeds = 60
    found = [grams(model, x, y, fk.Sketch(2, seed)) for seed in range(seeds)]
    compressed = 0
    for name, k in exact.items():
        each = torch.stack([matrices[name] for matrices in found])
        deviation = each.std(0)
        compressed += bool((deviation > 1e-3 * k.abs().max()).any())
        assert ((each.mean(0) - k).abs() <= 5 * deviation / seeds**0.5 + 1e-12 * k.abs().max()).all(), name
    assert compressed


def test_one_sketch_for_all_uses_of_a_tied_weight():
    model, x, y = make("language-model-bias", N)
    name = "embedding+head"
    rows = sample_gradients(model, x, y)
    weight, bias = rows["embedding.weight"] / N, rows["head.bias"] / N
    r, q = oracles.sketch_matrix(7, 3, 9, OUTPUTS)[0], oracles.sketch_matrix(4, 3, 9, INPUTS)[0]
    c = torch.cat([torch.einsum("nvd,vr,dq->nrq", weight, r, q).flatten(1), bias], 1)
    k = grams(model, x, y, fk.Sketch(3, 9))[name]
    torch.testing.assert_close(k, c @ c.T)


def test_chunks_of_a_generic_module_are_compressed_alike(monkeypatch):
    model, x, y = make("lstm", N)
    sketch = fk.Sketch(3, 9)
    whole = grams(model, x, y, sketch)
    assert not torch.equal(whole["layer"], grams(model, x, y, None)["layer"])
    monkeypatch.setattr(generic_module, "PER_SAMPLE_GRAD_BYTES", 1)
    torch.testing.assert_close(grams(model, x, y, sketch)["layer"], whole["layer"])


def test_a_solving_step_takes_the_coefficients_of_the_sketched_matrix():
    model, x, y = make("mlp", N)
    sketch = fk.Sketch(2, 5)
    k = grams(model, x, y, sketch)
    rows = {name: c / N for name, c in blocks(model, sample_gradients(model, x, y)).items()}
    opt = fngd.FNGD(model, share="none", damping=0.2, sketch=sketch)
    F.cross_entropy(model(x), y).backward()
    found = blocks(model, {name: p.grad[None] for name, p in model.named_parameters()})
    for name, c in rows.items():
        lam = 0.2 * N * k[name].trace()
        v = torch.linalg.solve(N * k[name] + lam * torch.eye(N), torch.ones(N, dtype=torch.float64))
        torch.testing.assert_close(found[name][0], (v / v.mean()) @ c)
    assert opt.stats()["solved_batches"] == 1


def trained(sketch, steps=12, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(24, 40), torch.randint(0, 3, (24,))
    opt = fngd.FNGD(model, lr=0.2, share="none", sketch=sketch, **options)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


def test_training_approaches_the_exact_one_as_the_sketch_grows():
    exact, _ = trained(None, damping=0.01)
    errors = []
    for size in (4, 24, 40):
        found = [trained(fk.Sketch(size, seed), damping=0.01) for seed in range(4)]
        assert all(losses[-1] < losses[0] for _, losses in found)
        errors.append(sum(float((weights - exact).norm()) for weights, _ in found))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] == 0


def test_a_resumed_run_goes_on_bit_for_bit():
    def run():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 3))
        return model, fngd.FNGD(model, lr=0.1, base="adamw", sketch=4)

    def train(model, opt, steps):
        for step in steps:
            ids = torch.arange(4) + 4 * (step % 6)
            opt.set_samples(ids)
            opt.zero_grad()
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            opt.step()

    x, y = torch.randn(24, 40), torch.randint(0, 3, (24,))
    through, resumed = run(), run()
    train(*through, range(3))
    state = copy.deepcopy([part.state_dict() for part in through])
    train(*through, range(3, 9))
    torch.rand(7)
    for part, saved in zip(resumed, state, strict=True):
        part.load_state_dict(saved)
    train(*resumed, range(3, 9))
    for p, q in zip(through[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("sketch", [True, 2.5, "8"])
def test_refused_types(sketch):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="sketch: expected an int, a Sketch or None, got"):
        fngd.FNGD(model, sketch=sketch)
    with pytest.raises(TypeError, match="sketch: expected an int, a Sketch or None, got"):
        fngd.layer_grams(model, lambda: model(torch.ones(2, 3)).sum(), sketch=sketch)
    with pytest.raises(ValueError, match="sketch: expected an int, 1 or more"):
        fngd.FNGD(model, sketch=0)
