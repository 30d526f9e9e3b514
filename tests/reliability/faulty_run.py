"""A run whose steps can fail: extra steps with a fault, so that it compares with a run without them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fngd

SAMPLES, N, STEPS = 24, 6, 12
EPOCH = SAMPLES // N


class Fault(nn.Module):
    """A module between layers that raises in the forward or in the backward when it is told to."""

    where = ""

    def forward(self, x):
        if self.where == "forward":
            raise ArithmeticError("in the forward")
        if self.where == "backward":
            x.register_hook(self.fail)
        return torch.tanh(x)

    @staticmethod
    def fail(gradient):
        raise ArithmeticError("in the backward")


class Run:
    """Classification of 24 samples in batches of 6, by FNGD or, for share="GaussNewton", by GaussNewton."""

    def __init__(self, share, base="sgd"):
        torch.manual_seed(0)
        self.fault = Fault()
        self.model = nn.Sequential(nn.Linear(4, 8), self.fault, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.share, self.x = share, torch.randn(SAMPLES, 4)
        self.y = self.x[:, :3].argmax(1)
        if share == "GaussNewton":
            self.opt = fngd.GaussNewton(self.model, lr=0.3, damping=0.1, momentum=0.5)
        elif base == "sgd":
            self.opt = fngd.FNGD(self.model, lr=0.2, momentum=0.9, share=share)
        else:
            self.opt = fngd.FNGD(self.model, lr=0.02, base=base, share=share)

    def batch(self, step):
        """Return the batch of a step; the epochs differ in their order."""
        ids = torch.arange(SAMPLES).roll(step // EPOCH)[step % EPOCH * N :][:N]
        if self.share not in ("position", "GaussNewton"):
            self.opt.set_samples(ids)
        return self.x[ids], self.y[ids]

    def make_step(self, x, y):
        if self.share == "GaussNewton":
            self.opt.step(lambda: self.model(x) - F.one_hot(y, 3))
            return
        self.opt.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.opt.step()

    def train(self, steps):
        for step in steps:
            if step % EPOCH == 0 and self.share != "GaussNewton":
                self.opt.start_epoch()
            self.make_step(*self.batch(step))

    def loss(self):
        with torch.no_grad():
            return float(F.cross_entropy(self.model(self.x), self.y))

    def state_dict(self):
        return {"model": self.model.state_dict(), "opt": self.opt.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])

    def trajectory(self):
        """Return all tensors that the rest of the run depends on, by path."""
        state = self.state_dict()
        counters = {"outcomes"}  # of what was not finite: a run with a fault has more
        return {path: t for path, t in tensors(state) if path.rpartition(".")[2] not in counters}

    def assert_same(self, other):
        mine, theirs = self.trajectory(), other.trajectory()
        assert mine.keys() == theirs.keys()
        for path, tensor in mine.items():
            assert torch.equal(tensor, theirs[path]), path


def tensors(state, path=""):
    """Yield (path, tensor) of a nested state."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}.{key}")
