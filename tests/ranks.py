"""Processes that cannot hang a test: each ends with its parent, and all of them when their time is up.

As a program it runs another one under this watch: `python ranks.py program.py arguments` or `-m module ...`.
"""

import os
import runpy
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[int, int, Path], None]

SECONDS = 300
"""Given to the ranks of one run, on a machine with other work too; a collective may take a fifth."""


def end_with_parent() -> None:
    """Have this process end within a second of its parent, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(ranks: int, folder: Path, *checks: Check, seconds: float = SECONDS) -> None:
    """Run checks, functions of (rank, ranks, folder), on all ranks of a gloo group, meeting after each.

    Raises: TimeoutError when they take longer, with all ranks killed; what a rank raised.
    """
    # Met in a file: no port has to be free.
    meeting = f"file://{folder}/{uuid.uuid4()}"
    context = torch.multiprocessing.spawn(
        _rank, (ranks, folder, meeting, seconds / 5, checks), nprocs=ranks, join=False
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=1):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{ranks} ranks took longer than {seconds} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def torchrun(script: Path, **environment: str) -> str:
    """Return what two ranks of a script print, run in its folder.

    Raises: TimeoutExpired, with the ranks ended: they would hold the pipes; AssertionError where one fails.
    """
    options = ["--standalone", "--nproc-per-node=2"]  # with a port that the system chooses
    command = [sys.executable, __file__, "-m", "torch.distributed.run", *options, __file__, script.name]
    done = subprocess.run(
        command,
        cwd=script.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=SECONDS / 2,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _rank(
    rank: int, ranks: int, folder: Path, meeting: str, seconds: float, checks: tuple[Check, ...]
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=limit)
    try:
        for check in checks:
            check(rank, ranks, folder)
            dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
