"""The progress line: step, loss, bound, speed and the time left."""

import sys
import time
from pathlib import Path

from model.bounds import Bound

from ..state import TrainState
from .base import Hook, StepRecord

PLAIN_INTERVAL = 10.0
"""Seconds between lines where the output is not a terminal."""


class ProgressLine(Hook):
    """Rewrites one line on a terminal; prints a line now and then elsewhere."""

    def __init__(self, name: str, total_steps: int) -> None:
        self.name, self.total = name, total_steps
        self.live = sys.stdout.isatty()
        self.bound = ""

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Says where the run stands."""
        self.started, self.first, self.printed = time.monotonic(), state.step, 0.0
        if state.step >= self.total:
            again = "raise train.steps to train on, or repeat it with folder=..."
            self._line(f"{self.name}: finished at step {state.step}; {again}")
        elif resumed:
            self._line(f"{self.name}: resuming at step {state.step} of {self.total}")

    def on_log(self, record: StepRecord) -> None:
        """Rewrites or prints the line."""
        now = time.monotonic()
        last = record.step == self.total
        if not self.live and not last and now - self.printed < PLAIN_INTERVAL:
            return
        self.printed = now
        per_step = (now - self.started) / max(1, record.step - self.first)
        left = _clock(per_step * (self.total - record.step))
        mfu = f"  mfu {record.mfu:.0%}" if record.mfu is not None else ""
        latent = f"  kl {record.latent.kl:.2f}" if record.latent is not None else ""
        skipped = f"  skipped {record.skipped}" if record.skipped else ""
        text = (
            f"{self.name}  step {record.step}/{self.total}  loss {record.loss:.3f}{self.bound}{latent}"
            f"  {record.tokens_per_second / 1000:.1f}k tok/s{mfu}{skipped}  eta {left}"
        )
        print(f"\r\x1b[2K{text}" if self.live else text, end="" if self.live and not last else "\n", flush=True)

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """Keeps the bound for the line."""
        if bound.tokens:
            self.bound = f"  {bound.kind} {bound.value:.3f}"

    def on_finish(self, state: TrainState) -> None:
        """The last bound, in full."""
        if self.bound and state.step > self.first:
            self._line(f"{self.name}: finished at step {state.step},{self.bound} nats per token on held-out rows")

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """Names the last checkpoint."""
        if state.step == self.total:
            self._line(f"{self.name}: checkpoint {path}")

    def on_rollback(self, state: TrainState, *, spike: int) -> None:
        """Says that the run goes back."""
        first, end = state.passed_over[-1]
        self._line(
            f"{self.name}: a spike in step {spike}, back to step {state.step} without batches {first} to {end - 1}"
        )

    def on_stop(self, state: TrainState, reason: str) -> None:
        """Says where it stopped."""
        self._line(f"{self.name}: stopped at step {state.step} of {self.total} ({reason})")

    def _line(self, text: str) -> None:
        print(f"\r\x1b[2K{text}" if self.live else text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
