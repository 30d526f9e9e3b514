"""Loaders that fail: workers that die, datasets that raise, early exits. Ids stay those of the samples."""

import contextlib
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fngd

AREA = "Faults in training"
SAMPLES, SIZE = 23, 3
# One for the death of a worker, raised in whatever line runs then, perhaps one for a tensor that it held.
DEATH = (RuntimeError, OSError, EOFError)
FAILURES = {"dataset raises": ArithmeticError, "worker ends itself": DEATH, "worker is killed": DEATH}
"""What happens at item 7, and the errors of torch that come of it."""
LOADERS = {
    "no workers": {},
    "two workers": {"num_workers": 2},
    "two workers, prefetching": {"num_workers": 2, "prefetch_factor": 4},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
}


class Rows(Dataset):
    """Item i: a row, a label and i itself; item 7 fails as long as `failure` says how."""

    def __init__(self, failure=None):
        self.failure, self.length = failure, SAMPLES
        self.x = torch.randn(2 * SAMPLES, 4)
        self.y = self.x[:, :3].argmax(1)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i == 7 and self.failure == "dataset raises":
            raise ArithmeticError("item 7")
        if i == 7 and self.failure == "worker ends itself":
            os._exit(1)
        if i == 7 and self.failure == "worker is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i], self.y[i], i


class Loop:
    """Training whose every batch is compared with the samples that the optimizer was told."""

    def __init__(self, data, **options):
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.opt = fngd.FNGD(self.model, lr=0.3)
        self.loader = fngd.track(DataLoader(data, SIZE, shuffle=True, **options), self.opt)
        self.begun: set[int] = set()
        self.trained: set[int] = set()
        self.losses: list[float] = []

    def step(self, x, y, ids):
        assert self.opt._schedule.batch.ids.tolist() == ids.tolist()
        self.begun |= set(ids.tolist())
        self.opt.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.opt.step()
        self.trained |= set(ids.tolist())
        self.losses.append(float(loss.detach()))

    def epoch(self, batches=None):
        for number, batch in enumerate(self.loader):
            if number == batches:
                break
            self.step(*batch)

    def assert_known(self):
        """The table knows the samples that were trained on; torch raises a worker's death in any line."""
        self.opt.stats()  # settles what is pending
        seen = self.opt._schedule.table.seen
        assert self.trained <= set(seen.nonzero().flatten().tolist()) <= self.begun


def iterated_again(failure, options):
    """Train until three passes are complete; return how many errors there were."""
    data, complete, errors = Rows(failure), 0, 0
    loop = Loop(data, **options)
    while complete < 3:
        try:
            loop.epoch()
            complete += 1
        except FAILURES[failure]:
            # A death is raised a moment later where a tensor of the dead was missed first.
            with contextlib.suppress(*DEATH):
                time.sleep(0.1)
            errors += 1
            data.failure = None
            if (
                "persistent_workers" in options
            ):  # their copy of the data is the old one, the dead are not replaced
                loop.loader = fngd.track(DataLoader(data, SIZE, shuffle=True, **options), loop.opt)
    loop.assert_known()
    assert len(loop.trained) == SAMPLES
    return errors


def in_a_process(function, *arguments):
    """Call in a process of its own, which no late error of torch leaves."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def call():
        there.send(function(*arguments))
        os._exit(0)

    process = context.Process(target=call)
    process.start()
    there.close()
    try:
        assert here.poll(60), "no answer in a minute"
        return here.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_loader_that_failed_is_iterated_again(kind, failure, tally):
    if kind == "no workers" and failure != "dataset raises":
        pytest.skip("it would end the test itself")
    assert in_a_process(iterated_again, failure, LOADERS[kind]) > 0
    tally(AREA, f"{failure}, tracked loader", "torch's error, then ids right in the next passes")


@pytest.mark.parametrize("kind", LOADERS)
def test_a_pass_that_goes_on_after_an_error(kind, tally):
    loop, failed, finished = Loop(Rows("dataset raises"), **LOADERS[kind]), 0, False
    batches = iter(loop.loader)
    while not finished:
        try:
            batch = next(batches, None)
        except ArithmeticError:
            failed += 1
            continue
        finished = batch is None
        if not finished:
            loop.step(*batch)
    loop.assert_known()
    assert failed == 1
    assert 7 not in loop.trained
    assert len(loop.trained) in (SAMPLES - SIZE, SAMPLES - SAMPLES % SIZE)
    tally(AREA, "dataset raises, the loop goes on with the next batch", "ids right, the batch is left out")


@pytest.mark.parametrize("kind", LOADERS)
def test_loops_that_leave_early(kind, full, tally):
    loop, draw = Loop(Rows(), **LOADERS[kind]), random.Random(0)
    passes = 40 if full else 4
    for _ in range(passes):
        loop.epoch(draw.randrange(8))
        loop.assert_known()
    tally(AREA, "loop that leaves a tracked loader early", "ids right in the next pass", passes)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_dataset_that_grows_and_shrinks(kind, tally):
    if "persistent" in kind:
        pytest.skip("persistent workers keep the dataset that they began with")
    data = Rows()
    loop = Loop(data, **LOADERS[kind])
    for length in (SAMPLES, 2 * SAMPLES, SAMPLES // 2, SAMPLES, 2 * SAMPLES):
        data.length = length
        loop.epoch()
        loop.assert_known()
        with pytest.raises(ValueError, match=f"below the dataset's length {length}"):
            loop.opt.set_samples([0, length])
    stats = loop.opt.stats()
    assert stats["seen_samples"] == 2 * SAMPLES
    loop.epoch()
    assert loop.opt.stats()["solved_batches"] == stats["solved_batches"]  # what was known stays known
    tally("Bad input", "dataset that grew or shrank between epochs", "ids right, new samples solved for", 4)
    tally("Bad input", "id beyond a dataset that shrank", "ValueError")
