"""How much scratch memory a kernel may take where its caller does not say."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .cost_model import WORKSPACE


class _Limit(threading.local):
    workspace = WORKSPACE


_limit = _Limit()


def default_workspace() -> int:
    """Return the bytes of scratch memory that a kernel may take in this thread."""
    return _limit.workspace


@contextmanager
def limited(workspace: int) -> Iterator[None]:
    """Let kernels that this thread calls inside take no more than `workspace` bytes of scratch memory."""
    before, _limit.workspace = _limit.workspace, workspace
    try:
        yield
    finally:
        _limit.workspace = before
