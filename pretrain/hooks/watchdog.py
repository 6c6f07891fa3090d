"""The watchdog: where no step finishes for too long, it writes down what every thread is doing and ends the process."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..endings import Ending
from ..state import TrainState
from .base import Hook

STDERR = 2
GRACE = 60.0
"""Seconds after which what could not be written is given up."""


class Watchdog(Hook):
    """A thread that waits for the loop to be alive.

    Behind it stands a second clock, which needs neither Python nor a disk: where the thread itself gets nowhere
    (something holds the interpreter, the run's folder hangs), faulthandler prints the stacks and ends the process
    with exit code 1.

    Args:
        folder: RUN/stalls.
        rank: for the name of the file.
        limit: seconds without a sign of life.
        grace: seconds that the second clock gives the first.
        end: ends the process at once.
    """

    def __init__(
        self, folder: Path, rank: int, limit: float, *, grace: float = GRACE, end: Callable[[int], object] = os._exit
    ) -> None:
        self.folder, self.rank, self.limit, self.grace, self.end = folder, rank, limit, grace, end
        self.over = threading.Event()

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Starts to wait."""
        self.on_alive()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_alive(self) -> None:
        """The loop has got somewhere."""
        self.seen = time.monotonic()

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """A save takes its time."""
        self.on_alive()

    def on_finish(self, state: TrainState) -> None:
        """Nothing to wait for."""
        self.over.set()

    def on_stop(self, state: TrainState, reason: str) -> None:
        """Nothing to wait for."""
        self.over.set()

    def on_error(self, error: BaseException) -> None:
        """Nothing to wait for."""
        self.over.set()

    def _watch(self) -> None:
        while not self.over.is_set():
            faulthandler.dump_traceback_later(self.limit + self.grace, exit=True, file=STDERR)
            if time.monotonic() - self.seen > self.limit:
                self._end()
            self.over.wait(min(10.0, self.limit / 8))
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        """Standard error first: it is there even where the disk is not."""
        path = self.folder / f"rank-{self.rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        said = f"penumbra: rank {self.rank}: no step for {self.limit / 60:g} minutes, the stacks are in {path}"
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(STDERR)
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
                file.flush()
                os.fsync(file.fileno())
        self.end(Ending.STALLED)


def end_within(seconds: float, *, end: Callable[[int], object] = os._exit) -> None:
    """Ends the process with exit code 1 if it has not ended by itself: clean-up may wait for a rank that is gone."""
    timer = threading.Timer(seconds, end, (1,))
    timer.daemon = True
    timer.start()
