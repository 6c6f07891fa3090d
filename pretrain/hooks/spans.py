"""Where a rank's time goes: seconds by phase, one JSON line per log line in RUN/spans/rank-R.jsonl."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..memory import peak_memory
from ..state import TrainState
from . import json_lines
from .base import Hook, StepRecord

DEVICE_PHASES = ("forward", "backward", "reduce", "optimizer")
"""What the device does; what is reduced beside the backward pass belongs to that."""
HOST_PHASES = ("data_wait", "rank_wait", "log", "validation", "save")
"""What the host does or waits for: its batch, the other ranks, hooks, the disk."""


class Spans:
    """Adds up seconds by phase.

    On a GPU the device phases are taken between events in its stream, so nothing waits; the host runs ahead, and
    its waiting costs only as far as the device ran dry meanwhile: the phases may then add up to more than the time.

    Args:
        device: where the device phases happen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.opened = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time spent within the context belongs to the phase."""
        assert phase in DEVICE_PHASES + HOST_PHASES, phase
        if self.device.type == "cuda" and phase in DEVICE_PHASES:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((phase, start, end))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds by phase since they were last taken, and the wall time as `seconds`; waits for the device."""
        for phase, start, end in self.events:
            end.synchronize()
            self.seconds[phase] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        taken = {"seconds": now - self.opened, **self.seconds}
        self.seconds.clear()
        self.events.clear()
        self.opened = now
        return taken


class SpanFile(Hook):
    """Appends to RUN/spans/rank-R.jsonl.

    What follows a line at its step (its hooks, validation, save) stands in the next line, at the end in a last one.

    Args:
        path: the file.
        spans: what the loop fills.
    """

    def __init__(self, path: Path, spans: Spans) -> None:
        self.lines, self.spans = json_lines.JsonLines(path), spans

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Time counts from here."""
        self.step = state.step
        self.spans.take()

    def on_log(self, record: StepRecord) -> None:
        """A line."""
        self._write(record.step)

    def on_rollback(self, state: TrainState, *, spike: int) -> None:
        """A line of the steps that are lost."""
        self._write(spike)
        self.step = state.step

    def on_finish(self, state: TrainState) -> None:
        """The rest."""
        self._write(state.step)

    def on_stop(self, state: TrainState, reason: str) -> None:
        """The rest."""
        self._write(state.step)

    def _write(self, step: int) -> None:
        phases = {name: round(seconds, 6) for name, seconds in self.spans.take().items()}
        about = {"step": step, "steps": step - self.step, "time": round(time.time(), 3)}
        self.lines.append({**about, **phases, "peak_memory": peak_memory(self.spans.device)})
        self.step = step


def read_spans(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The lines of RUN/spans by rank, half-written ones left out."""
    files = {int(path.stem.removeprefix("rank-")): path for path in folder.glob("rank-*.jsonl")}
    return {rank: json_lines.read(files[rank]) for rank in sorted(files)}
