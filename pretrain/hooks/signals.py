"""Asking a run to stop: by a signal, or because its time is up. The loop looks where it can save."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
REASONS = (*(number.name for number in SIGNALS), "time limit")


class Stopped(Exception):
    """All ranks have agreed to stop here.

    Args:
        reason: one of REASONS.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StopRequest:
    """What this rank was asked; the ranks add their votes up and stop together.

    Args:
        limit: seconds from now after which it asks by itself; 0: never.
        clock: seconds that only grow.
    """

    def __init__(self, limit: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked: set[str] = set()
        self.clock, self.ends = clock, clock() + limit if limit else float("inf")

    def ask(self, reason: str) -> None:
        """Stop as soon as possible."""
        self.asked.add(reason)

    def votes(self) -> list[float]:
        """1 for each reason that this rank has, in the order of REASONS; to be summed over the ranks."""
        if self.clock() >= self.ends:
            self.ask("time limit")
        return [float(reason in self.asked) for reason in REASONS]

    def decide(self, votes: Sequence[float]) -> None:
        """Raises Stopped where any rank has voted for it."""
        for reason, count in zip(REASONS, votes, strict=True):
            if count:
                self.ask(reason)
                raise Stopped(reason)


@contextmanager
def stop_signals(request: StopRequest) -> Iterator[None]:
    """Within the context a signal of SIGNALS asks for a stop; a second SIGINT interrupts at once.

    Does nothing outside the main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name, known = signal.Signals(number).name, bool(request.asked)
        request.ask(name)
        again = ""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            again = "; once more ends it at once"
        if again or not known:
            os.write(2, f"\npenumbra: {name}: saving after this step{again}\n".encode())  # print is not reentrant

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
