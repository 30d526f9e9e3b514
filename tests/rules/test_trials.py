"""What the generic rule must find out before it weights a module, or else leave it and say why."""

import random

import pytest
import torch
from torch import nn

import fngd
from natural import check

N = 4


class Part(nn.Module):
    """Two outputs (N, 4) from two vectors."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))


class OutputOfOutput(Part):
    def forward(self, x):
        y = x * self.w
        return y, y * self.v


class ReturnsItsInput(Part):
    def forward(self, x):
        return x, torch.tanh(x * self.w) + self.v


class SameTwice(Part):
    def forward(self, x):
        y = x * self.w + self.v
        return y, y


class Remembers(Part):
    hidden: torch.Tensor | float = 0.0

    def forward(self, x):
        y = x * self.w + self.v * self.hidden
        self.hidden = y.detach()
        return y, y.sin()


class Averages(Part):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        y = (x - self.mean) * self.w + self.v
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return y, y.sin()


class Replaces(Averages):
    def forward(self, x):
        y = (x - self.mean) * self.w + self.v
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return y, y.sin()


class Skips(Part):
    def forward(self, x):
        return (x * self.w, x + self.v) if random.random() < 0.5 else (x + self.w, x * self.v)


class Clips(Part):
    def forward(self, x):
        y = x * self.w + self.v
        y.register_hook(lambda e: e.clamp(-0.1, 0.1))
        return y * 1, y.sin()


class Centres(Part):
    def forward(self, x):
        y = (x - x.mean(0)) * self.w + self.v
        return y, y.sin()


class Around(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.head = nn.Linear(4, 4), part, nn.Linear(8, 3)

    def forward(self, x, **options):
        return self.head(torch.cat(self.part(torch.tanh(self.first(x)), **options), 1).sin())


def weighted(part):
    """Return what coverage() says of a module, once its gradients were checked."""
    model, x = Around(part).double(), torch.randn(N, 4, dtype=torch.float64)
    state = {key: value.clone() for key, value in part.named_buffers()}

    def loss(net, samples):
        for key, value in state.items():
            setattr(net.part, key, value.clone())
        net.part.__dict__.pop("hidden", None)
        random.seed(1)
        return net(x[list(samples)]).square().sum(1).mean()

    return check(model, loss, N)["part.w"]


@pytest.mark.parametrize("kind", [OutputOfOutput, ReturnsItsInput, SameTwice])
def test_outputs_may_be_inputs_or_come_from_one_another(kind):
    assert weighted(kind()) == "generic"


@pytest.mark.parametrize("kind", [Remembers, Averages, Replaces])
def test_a_module_with_a_state_stays_plain(kind):
    assert weighted(kind()) == f"plain: {kind.__name__} keeps a state from call to call"


def test_a_module_that_draws_from_pythons_generator_stays_plain():
    assert weighted(Skips()) == "plain: Skips draws random numbers"


def test_a_trial_leaves_no_trace():
    for part in (Remembers(), Averages(), Replaces(), Skips()):
        model, x = Around(part), torch.randn(N, 4)
        opt = fngd.FNGD(model, share="none")
        torch.manual_seed(1), random.seed(1)
        model(x)
        after = (
            part.__dict__.get("hidden"),
            [b.clone() for b in part.buffers()],
            random.random(),
            torch.rand(1),
        )
        opt.detach()
        part.__dict__.pop("hidden", None)
        for b in part.buffers():
            b.zero_()
        torch.manual_seed(1), random.seed(1)
        model(x)
        plain = (
            part.__dict__.get("hidden"),
            [b.clone() for b in part.buffers()],
            random.random(),
            torch.rand(1),
        )
        torch.testing.assert_close(after, plain, rtol=0, atol=0)


def test_a_module_whose_gradient_is_not_linear_stays_plain():
    model = Around(Clips()).double()
    opt = fngd.FNGD(model, share="none")
    model(torch.randn(N, 4, dtype=torch.float64)).sum().backward()
    assert opt.coverage()["part.w"].startswith("plain: Clips c")


def test_a_batch_of_one_sample_decides_nothing():
    model = Around(Centres()).double()
    opt = fngd.FNGD(model, share="none")
    for samples, reason in ((1, "a batch of one sample"), (N, "Centres couples samples")):
        model(torch.randn(samples, 4, dtype=torch.float64)).sum().backward()
        assert opt.coverage()["part.w"].startswith(f"plain: {reason}")
    kept = Around(OutputOfOutput()).double()
    opt = fngd.FNGD(kept, share="none")
    for samples in (1, N, 1):
        kept(torch.randn(samples, 4, dtype=torch.float64)).sum().backward()
    assert opt.coverage()["part.w"].startswith("generic, at times plain: a batch of one sample")


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (Centres, "plain: Centres couples samples: its gradient is no sum over samples"),
        (OutputOfOutput, "generic"),
    ],
)
def test_samples_that_are_all_zero_hide_nothing(kind, how):
    model = Around(kind()).double()
    nn.init.zeros_(model.first.weight), nn.init.zeros_(model.first.bias)
    opt = fngd.FNGD(model, share="none")
    for _ in range(2):
        model(torch.randn(N, 4, dtype=torch.float64)).sum().backward()
        assert opt.coverage()["part.w"] == how
        nn.init.normal_(model.first.weight)


class Switched(Part):
    def forward(self, x, centre=False, table=None):
        y = (x - x.mean(0) if centre else x) * self.w + self.v
        return y, y.sin() if table is None else y * table.sum(0)


def test_a_call_of_another_kind_is_tried_again():
    model = Around(Switched()).double()
    opt = fngd.FNGD(model, share="none")
    for options, reason in (
        ({}, None),
        ({"centre": True}, "Switched couples samples"),
        ({"table": torch.randn(3, 4).double()}, None),
        ({"table": torch.randn(N, 4).double()}, "Switched couples samples"),  # as many rows as samples
        ({"table": torch.randn(3, 4).double().requires_grad_()}, "Switched depends on tensors"),
    ):
        model.part.w.grad = None
        next(layer for layer in opt._preconditioner.blocks if layer.name == "part").why_plain = ""
        x = torch.randn(N, 4, dtype=torch.float64)
        model(x, **options).square().sum().backward()
        found, opt_grad = model.part.w.grad.clone(), opt.coverage()["part.w"]
        assert opt_grad.startswith("generic" if reason is None else f"generic, at times plain: {reason}")
        opt.detach()
        model.part.w.grad = None
        model(x, **options).square().sum().backward()
        assert torch.allclose(found, model.part.w.grad) == (reason is not None)
        opt.attach()


class Rounds(torch.autograd.Function):
    """In the style that torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, e):
        return e


class Rounded(Part):
    def forward(self, x):
        y = Rounds.apply(self.w) * x
        return y + self.v, y


def test_a_module_that_torch_func_refuses_is_run_sample_by_sample():
    assert weighted(Rounded()) == "generic"
