"""One exact step against explicit Fisher matrices, and every layer's Gram matrix against per-sample
autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
from networks import NETWORKS, blocks, make, sample_gradients

N = 7


def gradients(model):
    return blocks(model, {name: p.grad[None] for name, p in model.named_parameters()})


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("damping_mode", "unit"),
    [("trace", lambda t: t / N), ("mean_eig", lambda t: t / N**2), ("absolute", lambda t: 1)],
)
def test_exact_gradient_is_the_natural_gradient_of_every_layer(network, damping_mode, unit):
    model, x, y = make(network, N)
    expected = {}
    for name, g in blocks(model, sample_gradients(model, x, y)).items():
        damping = 0.3 * unit(g.square().sum())
        fisher = g.T @ g / N
        expected[name] = torch.linalg.solve(
            fisher + damping * torch.eye(g.shape[1], dtype=g.dtype), g.mean(0)
        )

    opt = fngd.FNGD(
        model, share="none", normalize="raw", damping=0.3, damping_mode=damping_mode, norms="weighted"
    )
    F.cross_entropy(model(x), y).backward()

    for name, gradient in gradients(model).items():
        error = (gradient[0] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-8, name
    assert opt.stats()["failed_solves"] == 0


@pytest.mark.parametrize("normalize", ["mean", "lambda", "graft"])
def test_normalizations_scale_the_natural_gradient(normalize):
    model, x, y = make("conv2d-groups-reflect", N)
    opt = fngd.FNGD(model, share="none", normalize=normalize, damping=0.3)
    F.cross_entropy(model(x), y).backward()
    natural = gradients(model)
    opt.detach()
    for name, g in blocks(model, sample_gradients(model, x, y)).items():
        damping = 0.3 * g.square().sum() / N
        v = torch.linalg.solve(
            g @ g.T / N + damping * torch.eye(N, dtype=g.dtype), torch.ones(N, dtype=g.dtype)
        )
        scale = {
            "mean": 1 / v.mean(),
            "lambda": damping,
            "graft": g.mean(0).norm() / (v @ g / N).norm(),
        }[normalize]
        torch.testing.assert_close(natural[name][0], scale * (v @ g) / N, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", ["linear", "conv"])
def test_exact_gradient_of_a_loss_with_a_gradient_penalty(network):
    layers = {
        "linear": [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)],
        "conv": [nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)],
    }
    model = nn.Sequential(*layers[network]).double()
    x = torch.randn(N, 5, dtype=torch.float64)
    x = x if network == "linear" else x.unsqueeze(1)

    def losses(x):
        x = x.detach().requires_grad_()
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y.square().sum(-1) + dx.square().flatten(1).sum(-1)

    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(losses(x[n : n + 1]).sum(), parameters) for n in range(N)]
    samples = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    opt = fngd.FNGD(model, share="none", normalize="raw", damping=0.3)
    losses(x).mean().backward()
    assert opt.stats()["failed_solves"] == 0
    for name, g in blocks(model, samples).items():
        damping = 0.3 * g.square().sum() / N
        fisher = g.T @ g / N
        expected = torch.linalg.solve(fisher + damping * torch.eye(g.shape[1], dtype=g.dtype), g.mean(0))
        torch.testing.assert_close(gradients(model)[name][0], expected, rtol=1e-8, atol=1e-12)


LAYOUTS = [(name, torch.contiguous_format) for name in NETWORKS]
IMAGES = ("conv2d", "transposed-conv2d", "group", "reused")
LAYOUTS += [(name, torch.channels_last) for name in NETWORKS if name.startswith(IMAGES)]


@pytest.mark.parametrize(("network", "memory_format"), LAYOUTS, ids=str)
def test_single_precision_grams_and_gradients(network, memory_format):
    double, x, y = make(network, N)
    truth = blocks(double, sample_gradients(double, x, y))

    model = copy.deepcopy(double).float()
    x = x.float() if x.is_floating_point() else x
    if x.ndim == 4:
        model, x = model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
    grams = fngd.layer_grams(model, lambda: F.cross_entropy(model(x), y))

    assert set(grams) == set(truth)
    assert all(p.grad is None for p in model.parameters())
    for name, g in truth.items():
        expected = g @ g.T / N**2
        assert grams[name].dtype == torch.float32
        assert (grams[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name

    opt = fngd.FNGD(model, share="none", norms="weighted")
    F.cross_entropy(model(x), y).backward()
    for layer in opt._preconditioner.blocks:
        expected = opt._report.last_coefficients[layer].double() @ truth[layer.name] / N
        gradient = gradients(model)[layer.name][0]
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), layer.name


class BatchNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def test_batch_norm_contributions_are_what_each_row_gives_at_the_layer():
    model = BatchNormNet().double()
    x, y = torch.randn(N, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (N,))
    outputs = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: outputs.__setitem__(n, o))
        for n, m in model.named_children()
    ]
    loss = F.cross_entropy(model(x), y)
    truth = {}
    for name, module in model.named_children():
        cotangent = torch.autograd.grad(loss, outputs[name], retain_graph=True)[0]
        rows = []
        for n in range(N):
            mask = torch.zeros(N, dtype=torch.float64)
            mask[n] = 1
            masked = cotangent * mask.view(-1, *[1] * (cotangent.ndim - 1))
            parts = torch.autograd.grad(outputs[name], list(module.parameters()), masked, retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        truth[name] = torch.stack(rows)
    for hook in hooks:
        hook.remove()
    statistics = copy.deepcopy(model.norm.state_dict())

    twin = copy.deepcopy(model)
    grams = fngd.layer_grams(model, lambda: F.cross_entropy(model(x), y))
    for name, rows in truth.items():
        torch.testing.assert_close(grams[name], rows @ rows.T, rtol=1e-10, atol=1e-14)
    twin(x)
    for name, value in twin.norm.state_dict().items():
        torch.testing.assert_close(model.norm.state_dict()[name], value)
    assert not torch.equal(statistics["running_mean"], model.norm.running_mean)


@pytest.mark.parametrize("seed", range(3))
def test_shared_coefficients_weigh_contributions_and_leave_input_gradients(seed):
    torch.manual_seed(seed)
    model, x, y = make("conv2d-groups-reflect", N)
    opt = fngd.FNGD(model, lr=0.0)
    for _ in range(2):  # solve, then share
        opt.set_samples(torch.arange(N))
        x.requires_grad_()
        opt.zero_grad()
        dx = torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]
        F.cross_entropy(model(x), y).backward()
        opt.step()
    assert opt.stats()["solved_batches"] == 1
    opt.detach()
    truth = blocks(model, sample_gradients(model, x, y))
    for layer in opt._preconditioner.blocks:
        s = opt._report.last_coefficients[layer].float().double()  # the table keeps single precision
        torch.testing.assert_close(
            gradients(model)[layer.name][0], s @ truth[layer.name] / N, rtol=1e-9, atol=1e-12
        )
    torch.testing.assert_close(
        dx, torch.autograd.grad(F.cross_entropy(model(x), y), x)[0], rtol=1e-10, atol=1e-13
    )
