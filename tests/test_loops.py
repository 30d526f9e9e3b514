"""Training loops as people write them, each run twice: by FNGD, and by torch's SGD on gradients from the
definition in float64; and what a loop may not do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
from networks import make
from trajectory import Definition

SAMPLES, N = 10, 4


class Ours:
    """A model with FNGD, under the names that its definition has."""

    def __init__(self, model):
        self.model, self.opt = model, None

    def optimizer(self, params=None, **options):
        self.opt = fngd.FNGD(self.model, params=params, norms="weighted", **options)
        return self.opt

    def name(self, ids):
        self.opt.set_samples(ids)

    def backward(self, contributions):
        contributions.sum().backward()


class Theirs(Definition):
    def optimizer(self, params=None, **options):
        return torch.optim.SGD(self.model.parameters() if params is None else params, **options)


def epochs(drop_last=False, samples=SAMPLES, size=N):
    """Yield the ids of the batches of two epochs; the last ones are short."""
    for order in (torch.arange(samples), torch.randperm(samples, generator=torch.Generator().manual_seed(1))):
        batches = order.split(size)
        yield from (ids.tolist() for ids in batches if len(ids) == size or not drop_last)


def forward(side, x, y, ids):
    """Return the losses of the named samples."""
    side.name(ids)
    return F.cross_entropy(side.model(x[ids]), y[ids], reduction="none")


def step_by_step(reduce=torch.Tensor.mean, set_to_none=True, before_step=lambda model: None, **options):
    """Return the usual loop, with what can vary in it."""

    def loop(side, x, y):
        opt = side.optimizer(lr=0.1, momentum=0.9, **options)
        for ids in epochs():
            opt.zero_grad(set_to_none=set_to_none)
            losses = forward(side, x, y, ids)
            side.backward(losses / len(ids) if reduce is torch.Tensor.mean else losses)
            before_step(side.model)
            opt.step()

    return loop


def drop_last(side, x, y):
    opt = side.optimizer(lr=0.1)
    for ids in epochs(drop_last=True):
        side.backward(forward(side, x, y, ids) / N)
        opt.step()
        opt.zero_grad()


def weighted_mean(side, x, y):
    """Labels weigh differently, as tokens do in sentences of different lengths."""
    opt, weight = side.optimizer(lr=0.1), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    for ids in epochs():
        side.name(ids)
        losses = F.cross_entropy(side.model(x[ids]), y[ids], weight=weight, reduction="none")
        opt.zero_grad()
        side.backward(losses / weight[y[ids]].sum())
        opt.step()


def accumulation(side, x, y):
    """Two micro-batches a step, each with the Gram matrix of its own samples."""
    opt = side.optimizer(lr=0.1)
    for ids in epochs():
        for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
            side.backward(forward(side, x, y, part) / len(ids))
        opt.step()
        opt.zero_grad()


def two_losses_one_backward(side, x, y):
    opt = side.optimizer(lr=0.1)
    for ids in epochs():
        side.name(ids)
        output = side.model(x[ids])
        losses = F.cross_entropy(output, y[ids], reduction="none") + 0.1 * output.square().sum(1)
        opt.zero_grad()
        side.backward(losses / len(ids))
        opt.step()


def two_backwards(side, x, y):
    """A second forward with other labels; what its backward solved for is what is kept."""
    opt = side.optimizer(lr=0.1)
    for ids in epochs():
        opt.zero_grad()
        side.name(ids)
        for labels in (y, (y + 1) % 3):
            side.backward(F.cross_entropy(side.model(x[ids]), labels[ids], reduction="none") / len(ids))
        opt.step()


def closure(side, x, y):
    opt = side.optimizer(lr=0.1, momentum=0.9)
    for ids in epochs():

        def evaluate(ids=ids):
            opt.zero_grad()
            losses = forward(side, x, y, ids)
            side.backward(losses / len(ids))
            return losses.mean()

        assert opt.step(evaluate).isfinite()


def groups_and_schedulers(side, x, y):
    biases = [p for name, p in side.model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in side.model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "lr": 0.2}]
    opt = side.optimizer(groups, lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[0.1, 0.2], total_steps=6)
    for ids in epochs():
        opt.zero_grad()
        side.backward(forward(side, x, y, ids) / len(ids))
        opt.step()
        schedule.step()


def joining_group(side, x, y):
    """A parameter outside the model, added while training."""
    opt = side.optimizer(lr=0.1)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for step, ids in enumerate(epochs()):
        if step == 2:
            opt.add_param_group({"params": [shift], "lr": 0.3})
        opt.zero_grad()
        side.name(ids)
        logits = side.model(x[ids]) + shift.detach() * torch.arange(3)
        side.backward(F.cross_entropy(logits, y[ids], reduction="none") / len(ids))
        shift.grad = torch.full_like(shift, 0.1)
        opt.step()
    assert shift.item() == pytest.approx(-0.12)


def growing_data(side, x, y):
    opt = side.optimizer(lr=0.1)
    for samples in (5, 5, 7, SAMPLES):
        for ids in torch.arange(samples).split(N):
            opt.zero_grad()
            side.backward(forward(side, x, y, ids.tolist()) / len(ids))
            opt.step()


def scaler(**options):
    def loop(side, x, y):
        opt = side.optimizer(lr=0.1, momentum=0.9, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        for ids in epochs():
            opt.zero_grad()
            side.backward(scaler.scale(forward(side, x, y, ids) / len(ids)))
            if "fused" not in options:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(side.model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()

    return loop


LOOPS = {
    "mean, short last batch": step_by_step(),
    "sum": step_by_step(reduce=torch.Tensor.sum),
    "zero_grad without None": step_by_step(set_to_none=False),
    "clipped norm": step_by_step(before_step=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.3)),
    "clipped values": step_by_step(before_step=lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.02)),
    "fused": step_by_step(fused=True, nesterov=True),
    "drop_last": drop_last,
    "weighted mean": weighted_mean,
    "accumulation": accumulation,
    "two losses, one backward": two_losses_one_backward,
    "two backwards": two_backwards,
    "closure": closure,
    "groups and schedulers": groups_and_schedulers,
    "joining group": joining_group,
    "growing data": growing_data,
    "scaler and clipping": scaler(),
    "scaler, fused": scaler(fused=True),
}


@pytest.mark.parametrize("network", ["mlp", "sequence", "conv2d-groups-reflect", "reused", "transformer"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_trains_what_the_definition_trains(loop, network):
    model, x, y = make(network, SAMPLES)
    theirs = Theirs(model)
    before = copy.deepcopy(model.state_dict())
    LOOPS[loop](Ours(model), x, y)
    LOOPS[loop](theirs, x, y)
    for (name, p), q in zip(model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(p, before[name])
