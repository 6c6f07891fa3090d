"""metrics.jsonl: one JSON object a line, always written; a later line for the same step replaces an earlier one."""

import time
from pathlib import Path
from typing import Any

from model.bounds import Bound

from ..state import TrainState
from ..writable import check_writable
from . import json_lines
from .base import Hook, StepRecord


class MetricsFile(Hook):
    """Appends to RUN/metrics.jsonl.

    Args:
        path: the file.
        about: facts written with the start event: versions, machine, number of parameters.

    Raises:
        ValueError: the file can not be written.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        check_writable(path)
        self.lines, self.about = json_lines.JsonLines(path), about
        self.started, self.worked = time.monotonic(), time.process_time()

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """The start or resume event."""
        self._event("resume" if resumed else "start", state.step, **self.about)

    def on_log(self, record: StepRecord) -> None:
        """A train line."""
        self._write("train", **record.numbers())

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """A validation line."""
        values = {bound.kind: bound.value, f"{bound.kind}_error": bound.error}
        self._write("validation", step=state.step, bound=bound.kind, **values, tokens=bound.tokens)

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """A checkpoint event."""
        self._event("checkpoint", state.step, path=path.name)

    def on_rollback(self, state: TrainState, *, spike: int) -> None:
        """A rollback event: the lines past its step are void."""
        self._event("rollback", state.step, spike=spike, passed_over=state.passed_over[-1])

    def on_finish(self, state: TrainState) -> None:
        """The finish event."""
        self._event("finish", state.step)

    def on_stop(self, state: TrainState, reason: str) -> None:
        """A stop event."""
        self._event("stop", state.step, reason=reason)

    def _event(self, event: str, step: int, **values: Any) -> None:
        self._write("event", step=step, event=event, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values)

    def _write(self, kind: str, **values: Any) -> None:
        clocks = {"seconds": time.monotonic() - self.started, "processor_seconds": time.process_time() - self.worked}
        rounded = {name: round(value, 3) for name, value in clocks.items()}
        self.lines.append({"kind": kind, **values, **rounded})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a half-written one is passed over.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: train the run first with `penumbra train`")
    return json_lines.read(path)
