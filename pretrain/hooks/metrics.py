"""metrics.jsonl: one JSON object a line, always written; a later line for the same step replaces an earlier one."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.bounds import Bound

from ..state import TrainState
from ..writable import check_writable
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
        self.path, self.about = path, about
        self.started, self.worked = time.monotonic(), time.process_time()

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """The start or resume event."""
        self._end_half_line()
        event = "resume" if resumed else "start"
        self._write("event", step=state.step, event=event, time=_now(), **self.about)

    def on_log(self, record: StepRecord) -> None:
        """A train line."""
        latent = {} if record.latent is None else asdict(record.latent)
        self._write("train", **{k: v for k, v in asdict(record).items() if k != "latent"}, **latent)

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """A validation line."""
        values = {bound.kind: bound.value, f"{bound.kind}_error": bound.error}
        self._write("validation", step=state.step, bound=bound.kind, **values, tokens=bound.tokens)

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """A checkpoint event."""
        self._write("event", step=state.step, event="checkpoint", time=_now(), path=path.name)

    def on_finish(self, state: TrainState) -> None:
        """The finish event."""
        self._write("event", step=state.step, event="finish", time=_now())

    def _write(self, kind: str, **values: Any) -> None:
        clocks = {"seconds": time.monotonic() - self.started, "processor_seconds": time.process_time() - self.worked}
        line = json.dumps({"kind": kind, **values, **{name: round(value, 3) for name, value in clocks.items()}})
        with self.path.open("a") as file:
            file.write(line + "\n")

    def _end_half_line(self) -> None:
        """A killed process may have left a line without its end."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a half-written one is passed over.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: train the run first with `penumbra train`")
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
