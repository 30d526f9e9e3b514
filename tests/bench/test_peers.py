import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faults
from bench.models.images import ResNet18
from bench.peers import (
    PEERS,
    PINN_NAMES,
    TRAINING_NAMES,
    Peer,
    Settings,
    Training,
    available,
    cycles,
    pinn_of,
    training_of,
)
from bench.peers import __main__ as peers_main
from bench.peers.__main__ import main
from bench.peers.muon import as_matrix, hidden_weights
from bench.peers.ssbroyden import SelfScaled
from bench.tools.timing import Timing

HERE = available(TRAINING_NAMES)[0]
PACKAGED = ("muon", "soap", "shampoo")


def build(name, model, lr=0.01):
    method = training_of(name)
    return method.build(model, Settings(lr=lr, damping=method.damping))


def train(model, update, x, y, count):
    losses = []
    for _ in range(count):
        if hasattr(update, "set_samples"):
            update.set_samples(range(len(x)))
        update.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses


def perceptron():
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_method_lowers_the_loss_of_a_convolutional_network(name, memory_format):
    if memory_format is torch.channels_last and not name.startswith("fngd"):
        # The shortcuts have as few as two channels.
        faults.skip_where_torch_fails_at_strided_convolutions_of_one_tap()
    torch.manual_seed(0)
    model = ResNet18(3, 4, width=2).to(memory_format=memory_format)
    x = torch.randn(8, 3, 8, 8).to(memory_format=memory_format)
    losses = train(model, build(name, model), x, torch.arange(8) % 4, 12)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", [name for name in HERE if training_of(name).resumes and name != "kfac"])
def test_restored_state_continues_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    model, other = perceptron(), perceptron()
    update, restored = build(name, model), build(name, other)
    train(model, update, x, y, 13)
    torch.save({"model": model.state_dict(), "update": update.state_dict()}, tmp_path / "state.pt")
    expected = train(model, update, x, y, 12)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    restored.load_state_dict(state["update"])
    assert train(other, restored, x, y, 12) == expected


@pytest.mark.parametrize("name", HERE)
def test_the_schedule_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = perceptron()
    update = build(name, model)
    for group in update.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    before = [p.clone() for p in model.parameters()]
    train(model, update, torch.randn(9, 6), torch.arange(9) % 3, 2)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_packages_of_the_development_set_are_here():
    assert set(PACKAGED) <= set(HERE)


def test_a_peer_says_where_it_takes_part():
    assert {"sgd", "fngd", "soap", "kfac"} <= set(TRAINING_NAMES)
    assert {name for name in PEERS if name in TRAINING_NAMES and name in PINN_NAMES} == {"muon", "soap"}
    assert all(peer.training or peer.pinn for peer in PEERS.values())
    with pytest.raises(KeyError, match="lbfgs"):
        training_of("lbfgs")
    with pytest.raises(KeyError, match="kfac"):
        pinn_of("kfac")


def test_missing_library_is_named():
    peer = Peer("Other", module="no_such_module", source="pip install other")
    assert peer.missing() == "Other: no module 'no_such_module'; pip install other"
    assert PEERS["sgd"].missing() is None


def test_muon_takes_hidden_weights_and_adamw_the_rest():
    model = ResNet18(3, 4, width=2)
    hidden = hidden_weights(model)
    named = {id(p): name for name, p in model.named_parameters()}
    names = [named[id(p)] for p in hidden]
    assert "conv.weight" not in names
    assert "linear.weight" not in names
    assert len(names) == 19
    update = build("muon", model)
    counts = [len(group["params"]) for group in update.param_groups]
    assert sum(counts) == len(named)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_convolutions_along_orthogonal_matrices(memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 2))
    model.to(memory_format=memory_format)
    weight = model[1].weight
    before = as_matrix(weight.detach()).clone()
    update = build("muon", model, lr=0.5)
    for group in update.param_groups:
        group["weight_decay"] = 0.0
    train(model, update, torch.randn(5, 2, 4, 4), torch.arange(5) % 2, 1)
    moved = as_matrix(weight.detach()) - before
    # 0.2 lr sqrt(larger side): torch's rule for the size, five Newton-Schulz steps leave 30 % of it open
    singular = torch.linalg.svdvals(moved) / (0.2 * 0.5 * 27**0.5)
    assert ((singular > 0.6) & (singular < 1.3)).all()


def muon_fit():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(20, 2, dtype=torch.float64)

    class Task:
        def __init__(self):
            self.network, self.parameters = network, list(network.parameters())

        def backward(self):
            for parameter in self.parameters:
                parameter.grad = None
            loss = (network(x).squeeze(1) - x.prod(dim=1)).square().mean()
            loss.backward()
            return loss

    return Task()


def test_muon_on_equations_moves_the_hidden_weight_along_an_orthogonal_matrix_without_decay():
    task = muon_fit()
    before = [p.detach().clone() for p in task.parameters]
    pinn_of("muon").build(task, lr=0.1)(0.0)
    moved = [p - q for p, q in zip(task.parameters, before, strict=True)]
    singular = torch.linalg.svdvals(moved[2]) / (0.2 * 0.1 * 8**0.5)
    # the gradient's smallest singular values stay small in five Newton-Schulz steps
    assert ((singular[:4] > 0.6) & (singular[:4] < 1.3)).all()
    # AdamW's first step is the rate times a sign: there is no decay beside it
    for other in (moved[0], moved[1], moved[4]):
        assert torch.allclose(other.abs(), torch.tensor(0.1, dtype=torch.float64), rtol=1e-3)


def convex_quadratic(n):
    torch.manual_seed(n)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    matrix = q @ torch.diag(torch.logspace(0, 3, n, dtype=torch.float64)) @ q.T
    target = torch.randn(n, dtype=torch.float64)
    return matrix, lambda x: (float((x - target) @ matrix @ (x - target)) / 2, matrix @ (x - target))


@pytest.mark.parametrize("broyden", [True, False])
@pytest.mark.parametrize("n", [6, 20])
def test_self_scaled_updates_minimise_a_quadratic_in_about_n_steps(n, broyden):
    _, objective = convex_quadratic(n)
    optimizer = SelfScaled(objective, torch.zeros(n, dtype=torch.float64), broyden=broyden)
    start = objective(optimizer.x)[0]
    steps = next(k for k in range(1, 200) if optimizer.step() and objective(optimizer.x)[0] < 1e-10 * start)
    assert steps < 2 * n + 10


def rosenbrock(x):
    x = x.clone().requires_grad_()
    value = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    value.backward()
    return value.item(), x.grad


@pytest.mark.parametrize("broyden", [True, False])
def test_self_scaled_updates_minimise_rosenbrocks_function(broyden):
    start = torch.tensor([-1.2, 1.0, -1.2, 1.0], dtype=torch.float64)
    optimizer = SelfScaled(rosenbrock, start, broyden=broyden)
    for _ in range(100):
        optimizer.step()
    assert (optimizer.x - 1).abs().max() < 1e-6


@pytest.mark.parametrize("broyden", [True, False])
def test_self_scaled_update_is_the_formula(broyden):
    """Al-Baali's updates as they are printed, with the inverse of H and v written out."""
    n = 5
    optimizer = SelfScaled(rosenbrock, torch.full((n,), -1.2, dtype=torch.float64), broyden=broyden)
    branches = set()
    for _ in range(40):
        h, x, g = optimizer.inverse.clone(), optimizer.x.clone(), rosenbrock(optimizer.x)[1]
        assert optimizer.step()
        s, y = optimizer.x - x, rosenbrock(optimizer.x)[1] - g
        assert torch.allclose(s / s.norm(), -(h @ g) / (h @ g).norm(), atol=1e-6)
        ys, yhy = y @ s, y @ h @ y
        b_k, h_k = s @ torch.linalg.solve(h, s) / ys, yhy / ys
        tau, phi = torch.clamp(1 / b_k, max=1), torch.ones(())
        if broyden:
            a_k = b_k * h_k - 1
            c_k = torch.sqrt(a_k / (1 + a_k))
            rho = torch.clamp(h_k * (1 - c_k), max=1)
            theta = torch.maximum((rho - 1) / a_k, torch.minimum(1 / rho, (1 - b_k) / b_k))
            sigma = 1 + a_k * theta
            power = sigma.abs() ** (-1 / (n - 1))
            positive, negative = tau * torch.minimum(power, 1 / theta), torch.minimum(tau * power, sigma)
            tau = positive if theta > 0 else negative
            phi = (1 - theta) / (1 + a_k * theta)
            branches.add(bool(theta > 0))
        v = torch.sqrt(yhy) * (s / ys - h @ y / yhy)
        expected = (h - torch.outer(h @ y, y @ h) / yhy + phi * torch.outer(v, v)) / tau
        expected = expected + torch.outer(s, s) / ys
        assert torch.allclose(optimizer.inverse, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())
    assert branches == ({True, False} if broyden else set())


def test_a_failed_line_search_forgets_the_curvature():
    _, objective = convex_quadratic(6)
    optimizer = SelfScaled(objective, torch.ones(6, dtype=torch.float64), broyden=True)
    assert optimizer.step()
    optimizer._objective = lambda x: (float("nan"), torch.full_like(x, float("nan")))
    before = optimizer.x.clone()
    assert not optimizer.step()
    assert torch.equal(optimizer.x, before)
    assert torch.equal(optimizer.inverse, torch.eye(6, dtype=torch.float64))
    optimizer._objective = objective
    assert optimizer.step()


def test_average_over_the_schedule_solves_in_one_epoch():
    timings = {"sgd": Timing((1.0,)), "fngd": Timing((1.1,)), "fngd solving": Timing((2.0,))}
    rows = cycles.cycle_rows(timings, {"sgd": 5, "fngd": 6, "fngd solving": 9}, epochs=10)
    average = rows[-1]
    assert average["contender"] == "fngd average"
    assert average["ratio"] == pytest.approx((2.0 + 9 * 1.1) / 10)
    assert average["peak_bytes"] == 9
    assert rows[2]["extra_bytes"] == 4


def test_command_line_appends_rows(tmp_path, capsys):
    output = tmp_path / "peers.jsonl"
    arguments = ["--size", "tiny", "--network", "transformer", "--method", "muon", "fngd", "--rounds", "2"]
    assert main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["sgd", "muon", "fngd", "fngd solving", "fngd average"]
    assert rows[0]["ratio"] == 1
    assert {"commit", "torch", "cpu", "load", "network"} <= rows[0].keys()
    assert "gate passed" in capsys.readouterr().out


def test_method_that_fails_does_not_cost_the_others_their_rows(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device")

    monkeypatch.setitem(PEERS, "muon", Peer("Muon", Training((0.1,), broken)))
    output = tmp_path / "peers.jsonl"
    arguments = ["--size", "tiny", "--network", "transformer", "--method", "muon", "--rounds", "2"]
    assert main([*arguments, "--device", "cpu", "--output", str(output)]) == 1
    assert [json.loads(line)["contender"] for line in output.read_text().splitlines()] == ["sgd"]
    assert "FAILED muon: RuntimeError: no such device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "period", "length"), [("cuda", 1, 10), ("cuda", 4, 12), ("cuda", 100, 100), ("cpu", 4, 4)]
)
def test_a_turn_has_whole_periods_and_on_a_gpu_ten_steps(device, period, length):
    method = Training((0.1,), training_of("sgd").build, period=period)
    assert cycles.turn_length(method, torch.device(device)) == length


def test_no_gate_no_figures(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise AssertionError("coefficients of 0: relative deviation 1")

    monkeypatch.setattr(peers_main.gate, "check", fail)
    output = tmp_path / "peers.jsonl"
    assert main(["--size", "tiny", "--device", "cpu", "--output", str(output)]) == 2
    assert capsys.readouterr().out.count("gate: AssertionError: coefficients of 0") == 2
    assert not output.exists()
