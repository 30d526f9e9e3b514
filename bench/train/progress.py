"""A progress bar on a terminal, a line now and then in a log file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_INTERVAL_S = 15.0


class Progress:
    """Counts the training steps of a study; `note` prints a line of its own without tearing the bar."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, unit=" steps", smoothing=0.05, dynamic_ncols=True, disable=not self._interactive
        )
        self._start = self._logged = time.monotonic()
        self._doing = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def doing(self, what: str) -> None:
        """Name what the next steps belong to."""
        self._doing = what
        self._bar.set_description(what)

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more."""
        self.done += steps
        self._bar.update(steps)
        if not self._interactive and time.monotonic() - self._logged >= LOG_INTERVAL_S:
            self._log()

    def note(self, text: str) -> None:
        """Print a line."""
        self._bar.write(text, file=sys.stderr)

    def _log(self) -> None:
        self._logged = time.monotonic()
        part, elapsed = self.done / self.total, self._logged - self._start
        line = f"  {self._doing}: {self.done} of {self.total} steps ({part:.0%}) after {elapsed:.0f} s"
        print(line, file=sys.stderr, flush=True)
