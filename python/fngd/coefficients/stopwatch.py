"""Seconds spent in marked stretches of work, without waiting for the device that does it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up how long marked stretches take: on CUDA between two events, elsewhere on the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        # Stretches that the device may not have finished; there are never more than it is behind the host.
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside; in the capture of a CUDA graph nothing is done, and nothing counted."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
        elif torch.cuda.is_current_stream_capturing():
            yield
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)
            start.record(stream)
            yield
            end.record(stream)
            self._open.append((start, end))
            while self._open and self._open[0][1].query():
                self._close()

    def seconds(self) -> float:
        """Return the sum so far; waits for the stretches that the device has not finished."""
        while self._open:
            self._open[0][1].synchronize()
            self._close()
        return self._seconds

    def _close(self) -> None:
        start, end = self._open.popleft()
        self._seconds += start.elapsed_time(end) / 1000
