"""How much scratch memory a kernel may take if its caller does not say; standard library only."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

WORKSPACE = 64 << 20
"""Default upper bound of scratch memory, in bytes."""


class _Limit(threading.local):
    workspace = WORKSPACE


_limit = _Limit()


def default_workspace() -> int:
    """Return how many bytes of scratch memory a kernel may take in this thread."""
    return _limit.workspace


@contextmanager
def limited(workspace: int) -> Iterator[None]:
    """Allow kernels that this thread calls inside the context at most `workspace` bytes of scratch memory."""
    before, _limit.workspace = _limit.workspace, workspace
    try:
        yield
    finally:
        _limit.workspace = before
