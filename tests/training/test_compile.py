"""torch.compile: the steady state is one graph, compiled once; batches that are solved for run eagerly."""

import copy
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

import fngd
from networks import make

SAMPLES, BATCH = 27, 5


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def train(model, forward_of, epochs, share="sample", on_epoch=lambda epoch: None):
    """Train on shuffled batches, the last one short, with forward_of(opt)(x) as the forward."""
    generator = torch.Generator().manual_seed(1)
    width = next(model.parameters()).shape[1]
    x = torch.randn(SAMPLES, width, generator=generator)
    data = TensorDataset(x, torch.randint(0, 3, (SAMPLES,), generator=generator))
    opt = fngd.FNGD(model, lr=0.1, share=share, refresh_every=4)
    loader = fngd.track(DataLoader(data, BATCH, shuffle=True, generator=generator), opt)
    losses = []
    for epoch in range(epochs):
        for x, y in loader:
            opt.zero_grad()
            loss = F.cross_entropy(forward_of(opt)(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.detach())
        on_epoch(epoch)
    return torch.stack(losses)


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("share", ["sample", "position", "mean"])
def test_the_steady_state_is_one_graph_and_a_second_for_other_batch_sizes(share):
    model = network()
    expected = train(copy.deepcopy(model), lambda opt: opt._model, 7, share)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_so_far = []
    actual = train(
        model,
        lambda opt: model if opt.solving else compiled,
        7,
        share,
        lambda epoch: compiled_so_far.append(graphs()),
    )
    torch.testing.assert_close(actual, expected)
    assert compiled_so_far == [0, 2, 2, 2, 2, 2, 2]  # the fifth epoch solves again


def test_a_batch_longer_than_the_table_of_positions_is_compiled():
    model, x, y = make("mlp", 6)
    opt = fngd.FNGD(model, lr=0.0, share="position")
    opt.start_epoch()
    F.cross_entropy(model(x[:4]), y[:4]).backward()
    opt.step()
    opt.start_epoch()
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        opt.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert opt.stats()["solved_batches"] == 1


def test_without_fullgraph_the_compiled_model_may_run_every_step():
    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = Straight()
    expected = train(copy.deepcopy(model), lambda opt: opt._model, 3)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(train(model, lambda opt: compiled, 3), expected)


def test_a_batch_to_be_solved_for_is_refused_with_the_way_out():
    model, x, _ = make("mlp", 4)
    opt = fngd.FNGD(model, share="none")
    assert opt.solving
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"see fngd\.FNGD\.solving"):
        torch.compile(model, fullgraph=True, backend="eager")(x)


def test_the_example_of_the_docstring_runs_as_written():
    example = inspect.getdoc(fngd.FNGD.solving).split("\n\n")[1]
    body = textwrap.indent("loss.backward()\nopt.step()\nopt.zero_grad()\n", "    ")
    model = network()
    opt = fngd.FNGD(model, lr=0.1)
    data = TensorDataset(torch.randn(SAMPLES, 6), torch.randint(0, 3, (SAMPLES,)))
    namespace = {
        "torch": torch,
        "model": model,
        "opt": opt,
        "loader": fngd.track(DataLoader(data, BATCH, shuffle=True), opt),
        "loss_fn": F.cross_entropy,
    }
    example = textwrap.dedent(example).replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"')
    code = compile(f"{example}\n{body}", "optimizer.py", "exec")
    exec(code, namespace)
    assert graphs() == 0
    assert opt.stats()["seen_samples"] == SAMPLES
    exec(code, namespace)
    assert graphs() == 2


@pytest.mark.parametrize("normalized", [False, True])
def test_the_default_compiler_gives_the_eager_gradients(normalized):
    model, x, y = make("group-norm" if normalized else "mlp", 8)
    opt = fngd.FNGD(model, lr=0.0, norms="weighted")
    compiled = torch.compile(model, fullgraph=True)

    def gradients(forward):
        opt.set_samples(range(8))
        opt.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        opt.step()
        return [p.grad.clone() for p in model.parameters()]

    gradients(model)
    expected = gradients(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for actual, reference in zip(gradients(compiled), expected, strict=True):
                torch.testing.assert_close(actual, reference)
