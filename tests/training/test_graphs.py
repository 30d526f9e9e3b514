"""GraphedStep: which steps are captured, and that replays are the eager run bit for bit."""

import copy
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fngd
from fngd import graphs

SAMPLES, BATCH = 27, 5
SHARES = ["sample", "position", "mean", "none"]


class Captures:
    """Stands in for the capture of a CUDA graph: replaying runs the step again on its static tensors."""

    def __init__(self, monkeypatch):
        self.captured = self.replayed = 0
        monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
        monkeypatch.setattr(graphs, "_capture", self.capture)
        monkeypatch.setattr(
            graphs.GraphedStep, "_on_side_stream", lambda graphed, inputs: graphed.step(*inputs)
        )

    def capture(self, step, device):
        self.captured += 1
        output = torch.empty(())

        def replay():
            self.replayed += 1
            return output.copy_(step().detach())

        return replay


def network():
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def run(model, epochs, wrap, device="cpu", base="sgd", share="sample", on_epoch=lambda opt: None, **options):
    """Train on shuffled batches, the last one short, and return the optimizer and all losses."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator)
    data = TensorDataset(x, torch.randint(0, 3, (SAMPLES,), generator=generator))
    opt = fngd.FNGD(
        model,
        lr=torch.tensor(0.1, device=device),
        base=base,
        share=share,
        fused=True,
        refresh_every=3,
        **options,
    )
    loader = fngd.track(DataLoader(data, BATCH, shuffle=True, generator=generator), opt)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)

    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    stepper = wrap(opt, step)
    losses = []
    for _ in range(epochs):
        losses += [stepper(x.to(device), y.to(device)).detach() for x, y in loader]
        schedule.step()
        on_epoch(opt)
    return opt, torch.stack(losses)


def eager(opt, step):
    return step


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("base", "options"), [("sgd", {"momentum": 0.9}), ("adamw", {"weight_decay": 0.1})])
def test_replays_are_the_eager_run_bit_for_bit(monkeypatch, share, base, options):
    model = network()
    twin = copy.deepcopy(model)
    reference, expected = run(twin, 5, eager, base=base, share=share, **options)
    captures = Captures(monkeypatch)
    opt, actual = run(model, 5, fngd.GraphedStep, base=base, share=share, **options)

    assert torch.equal(actual, expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for name in ("solved_batches", "skipped_steps", "seen_samples", "epoch"):
        assert opt.stats()[name] == reference.stats()[name]
    # Epochs 1 and 4 solve; of the others the five full batches replay, except those that warm up.
    full = SAMPLES // BATCH
    assert captures.captured == 1
    assert captures.replayed == (5 if share == "none" else 3) * full - graphs.WARM_UP


def test_a_batch_that_is_not_finite_is_left_out_of_a_replay(monkeypatch):
    captures = Captures(monkeypatch)
    model = network()
    opt = fngd.FNGD(model, lr=torch.tensor(0.1), momentum=0.9, fused=True, share="none")

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    graphed, x = fngd.GraphedStep(opt, step), torch.randn(BATCH, 6)
    for _ in range(graphs.WARM_UP + 1):
        graphed(x)
    before = copy.deepcopy(model.state_dict())
    assert graphed(x * float("nan")).isnan()
    assert captures.replayed == 2
    assert opt.stats()["skipped_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    graphed(x)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_replaced_learning_rates_are_captured_anew(monkeypatch):
    captures = Captures(monkeypatch)

    def reload(opt):  # replaces the state and the learning rates, as every torch optimizer does
        if opt.stats()["epoch"] == 3:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    model = network()
    twin = copy.deepcopy(model)
    _, expected = run(twin, 6, eager, share="mean", on_epoch=reload)
    captures.captured = 0
    _, actual = run(model, 6, fngd.GraphedStep, share="mean", on_epoch=reload)
    assert torch.equal(actual, expected)
    assert captures.captured == 2


@pytest.mark.parametrize(("share", "graphs"), [("none", 2), ("sample", 1)])
def test_a_damping_that_graphs_solve_with_is_captured_anew(monkeypatch, share, graphs):
    captures = Captures(monkeypatch)

    def raised(opt):
        opt.damping = 0.1 if opt.stats()["epoch"] < 2 else 10.0

    model = network()
    _, expected = run(copy.deepcopy(model), 3, eager, share=share, on_epoch=raised)
    _, losses = run(model, 3, fngd.GraphedStep, share=share, on_epoch=raised)
    assert torch.equal(losses, expected)
    assert captures.captured == graphs


def test_a_batch_longer_than_the_table_of_positions_is_captured(monkeypatch):
    captures = Captures(monkeypatch)
    model = network()
    opt = fngd.FNGD(model, lr=torch.tensor(0.1), fused=True, share="position")

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    graphed = fngd.GraphedStep(opt, step)
    opt.start_epoch()
    graphed(torch.randn(4, 6))
    opt.start_epoch()
    for _ in range(2 * graphs.WARM_UP):
        graphed(torch.randn(5, 6))
    assert captures.captured == 1
    assert opt.stats()["solved_batches"] == 1


def test_off_cuda_every_step_runs_as_it_is():
    opt, losses = run(network(), 2, fngd.GraphedStep)
    assert losses[-1] < losses[0]
    assert opt.stats()["seen_samples"] == SAMPLES


def test_the_example_of_the_docstring_runs_as_written(monkeypatch):
    captures = Captures(monkeypatch)
    before, example = fngd.GraphedStep.__doc__.split("    Example:\n")
    assert "opt.zero_grad()" not in before
    example = textwrap.dedent(example).replace("momentum=0.9", "momentum=0.9, fused=True")  # CUDA's default
    namespace = {}
    exec(compile(example, "graphs.py", "exec"), namespace)
    assert namespace["loss"].ndim == 0
    assert captures.captured == 1


def test_bad_arguments(monkeypatch):
    model = network()
    with pytest.raises(TypeError, match=r"optimizer: expected an fngd\.FNGD, got SGD"):
        fngd.GraphedStep(torch.optim.SGD(model.parameters()), print)
    opt = fngd.FNGD(model, lr=0.25)
    with pytest.raises(ValueError, match=r"lr=torch\.tensor\(0\.25, device='cpu'\)"):
        fngd.GraphedStep(opt, print)
    opt.param_groups[0]["lr"] = torch.tensor(0.25)
    graphed = fngd.GraphedStep(opt, lambda x: 1.0)
    with pytest.raises(TypeError, match="step: expected the loss, a tensor, or None, got float"):
        graphed(torch.ones(2, 6))
    Captures(monkeypatch)
    with pytest.raises(TypeError, match="inputs: expected tensors, got int at position 1"):
        graphed(torch.ones(2, 6), 3)
    with pytest.raises(ValueError, match="fused"):
        fngd.GraphedStep(opt, print)


@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_graphs_on_the_device(share, base):
    model = network().cuda()
    twin = copy.deepcopy(model)
    _, expected = run(twin, 5, eager, "cuda", base, share)
    replays = []

    def wrap(opt, step):
        graphed = fngd.GraphedStep(opt, step)
        replays.append(graphed)
        return graphed

    _, actual = run(model, 5, wrap, "cuda", base, share)
    assert replays[0]._graph is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
