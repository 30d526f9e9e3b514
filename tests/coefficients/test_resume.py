"""Runs that end and go on: killed in the solving epoch, through torch's checkpoints, on another device."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fngd
from networks import make

SAMPLES, N, STEPS = 24, 4, 14
EPOCH = SAMPLES // N
CASES = [("sample", "adamw"), ("position", "sgd"), ("mean", "sgd"), ("none", "adamw")]


class Run:
    """A run of some steps whose data order and initial network depend on seeds alone."""

    def __init__(self, share, base, **options):
        torch.manual_seed(0)
        self.model, self.x, self.y = make("mlp", SAMPLES, torch.float32)
        options |= {"momentum": 0.9} if base == "sgd" else {}
        self.opt = fngd.FNGD(self.model, lr=0.05, base=base, share=share, **options)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.opt, 5, 0.5)

    def train(self, steps):
        for step in steps:
            if step % EPOCH == 0:
                self.opt.start_epoch(SAMPLES)
            order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step // EPOCH))
            ids = order[step % EPOCH * N :][:N]
            self.opt.set_samples(ids)
            self.opt.zero_grad()
            F.cross_entropy(self.model(self.x[ids]), self.y[ids]).backward()
            self.opt.step()
            self.schedule.step()

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in ("model", "opt", "schedule")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def killed(file, last_step):
    """Train all cases with a checkpoint after every step, and end as if the machine were switched off."""
    runs = [Run(*case) for case in CASES]
    for step in range(STEPS):
        for run in runs:
            run.train([step])
            if step == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
        torch.save([step + 1, *(run.state_dict() for run in runs)], f"{file}.new")
        os.replace(f"{file}.new", file)


def assert_same_run(one, other):
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(one.opt._schedule.table.values, other.opt._schedule.table.values)
    first, second = one.opt.stats(), other.opt.stats()
    for counter in ("epoch", "solved_batches", "seen_samples", "failed_solves", "skipped_steps"):
        assert first[counter] == second[counter]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_runs_killed_in_the_solving_epoch_go_on_bit_for_bit(tmp_path):
    file = tmp_path / "checkpoint.pt"
    program = (
        f"import torch; torch.set_num_threads(1); import test_resume; test_resume.killed({str(file)!r}, 4)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    step, *states = torch.load(file, weights_only=True)
    assert step == 4 < EPOCH
    for case, state in zip(CASES, states, strict=True):
        through, resumed = Run(*case), Run(*case)
        through.train(range(STEPS))
        resumed.load_state_dict(state)
        resumed.train(range(step, STEPS))
        assert_same_run(through, resumed)
        assert through.opt.stats()["solved_batches"] == (STEPS if case[0] == "none" else EPOCH)


def test_a_state_in_use_does_not_change_with_the_run(tmp_path):
    run = Run("sample", "adamw")
    run.train(range(3))
    torch.save(run.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = state["opt"]["fngd"]["values"].clone()
    other = Run("sample", "adamw")
    other.load_state_dict(state)
    other.train(range(3, STEPS))
    assert torch.equal(state["opt"]["fngd"]["values"], kept)
    assert other.opt._schedule.table.values.shape == kept.shape


def test_foreign_states_are_refused_and_change_nothing():
    run = Run("sample", "sgd")
    run.train(range(2))
    model, opt = run.model, run.opt
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"expected dampening, .* missing there"):
        opt.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.1).state_dict())
    other, *_ = make("conv1d", N)
    with pytest.raises(ValueError, match="layers"):
        opt.load_state_dict(fngd.FNGD(other).state_dict())
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="share='sample'"):
        opt.load_state_dict(fngd.FNGD(twin, share="none").state_dict())
    after = opt.state_dict()
    assert torch.equal(before["fngd"]["values"], after["fngd"]["values"])
    assert before["param_groups"] == after["param_groups"]


@pytest.mark.gpu
@pytest.mark.parametrize("map_location", ["cpu", "cuda"])
def test_a_state_goes_on_on_another_device(tmp_path, map_location):
    run, other = Run("sample", "adamw", fused=False), Run("sample", "adamw", fused=False)
    run.train(range(EPOCH + 2))
    torch.save(run.opt.state_dict(), tmp_path / "state.pt")
    model = other.model.cuda()
    model.load_state_dict(run.model.state_dict())
    opt = fngd.FNGD(model, base="adamw", lr=0.05, fused=False)
    opt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location=map_location))
    for optimizer, net in ((run.opt, run.model), (opt, model)):
        device = next(net.parameters()).device
        optimizer.set_samples(range(N))
        assert not optimizer.solving
        optimizer.zero_grad()
        F.cross_entropy(net(run.x[:N].to(device)), run.y[:N].to(device)).backward()
        optimizer.step()
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_torchs_checkpoint_round_trip(tmp_path):
    run, resumed = Run("sample", "adamw"), Run("sample", "adamw")
    run.train(range(EPOCH + 1))
    state = {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.opt)}
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint")
    torch.save(run.opt.state_dict()["fngd"], tmp_path / "fngd.pt")

    model, opt = resumed.model, resumed.opt
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_optimizer_state_dict(model, opt, state["optimizer"])
    opt.load_state_dict({**opt.state_dict(), "fngd": torch.load(tmp_path / "fngd.pt", weights_only=True)})
    resumed.schedule.load_state_dict(run.schedule.state_dict())
    run.train(range(EPOCH + 1, STEPS))
    resumed.train(range(EPOCH + 1, STEPS))
    assert_same_run(run, resumed)
