"""Ctrl-C at any time: the loop goes back to the last checkpoint and ends where an uninterrupted run ends."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from faulty_run import Run

from bench.train.checkpoint import load, save

STEPS = 20
CASES = [("sample", "sgd"), ("none", "adamw"), ("position", "sgd"), ("GaussNewton", "sgd")]


def interrupted(run, file, answer):
    """Train with a checkpoint after every step; answer with the interruptions and the parameters."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    step, stops, whole = 0, 0, False
    while not whole:
        try:
            if not stops:
                answer.send("began")
            while step < STEPS:
                run.train([step])
                save(file, {"step": step + 1, **run.state_dict()})
                step += 1
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            whole = True
        except KeyboardInterrupt:
            stops += 1
            stored = load(file)
            step = stored["step"]
            run.load_state_dict(stored)
    answer.send((stops, [p.detach().numpy() for p in run.model.parameters()]))
    os._exit(0)


@pytest.mark.parametrize(("share", "base"), CASES)
def test_ctrl_c_at_a_random_time(share, base, tmp_path, full, tally):
    whole, draw, hit = Run(share, base), random.Random(0), 0
    context = multiprocessing.get_context("fork")
    start = time.perf_counter()
    whole.train(range(STEPS))
    length = time.perf_counter() - start
    tries = 50 if full else 5
    for number in range(tries):
        file = tmp_path / f"{number}.pt"
        run = Run(share, base)
        save(file, {"step": 0, **run.state_dict()})
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=interrupted, args=(run, file, there))
        process.start()
        there.close()
        assert here.recv() == "began"
        time.sleep(draw.uniform(0.001, length))
        os.kill(process.pid, signal.SIGINT)
        assert here.poll(60)
        stops, parameters = here.recv()
        process.join()
        hit += stops
        for p, q in zip(whole.model.parameters(), parameters, strict=True):
            assert torch.equal(p, torch.from_numpy(q))
    assert hit > 0
    tally(
        "Faults in training",
        "Ctrl-C (SIGINT) at a random time, then the last checkpoint",
        "bitwise the uninterrupted run",
        hit,
    )
