"""What a run's folder shows while it trains: how far it is, which save is under way, which checkpoints are sealed."""

import json
from pathlib import Path

from pretrain.checkpoint.load import CHECKPOINTS
from pretrain.checkpoint.manifest import MANIFEST


class RunFolder:
    """Reads the lines of metrics.jsonl once each, as they come.

    starts: the steps at which the run was started or continued.
    step: steps finished since it was last started; None while it is starting.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offset = 0
        self.starts: list[int] = []
        self.step: int | None = None
        self.last_event = ""

    def look(self) -> None:
        """Takes note of new lines."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            self._take(line)

    def expect_start(self) -> None:
        """All processes are gone: what they wrote belongs to the past."""
        self.look()
        self.step = None

    def saves_under_way(self) -> list[int]:
        """Steps whose save the present processes have begun and not sealed; leftovers of killed ones do not count."""
        if self.step is None:
            return []
        steps = [step_of(path) for path in (self.folder / CHECKPOINTS).glob("step-*.tmp")]
        return [step for step in steps if self.starts[-1] < step <= self.step]

    def sealed(self) -> list[Path]:
        """Sealed checkpoints, the oldest first."""
        seals = (self.folder / CHECKPOINTS).glob(f"step-*/{MANIFEST}")
        return sorted(seal.parent for seal in seals if seal.parent.suffix != ".tmp")

    def newest_step(self) -> int:
        """The step of the newest sealed checkpoint, 0 without one."""
        return max(map(step_of, self.sealed()), default=0)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if record["kind"] == "train" and self.step is not None:
            self.step = record["step"]
        if record["kind"] == "event":
            self.last_event = record["event"]
            if self.last_event in ("start", "resume"):
                self.starts.append(record["step"])
                self.step = record["step"]


def step_of(path: Path) -> int:
    """Of a checkpoint's folder, by its name."""
    return int(path.stem.removeprefix("step-"))
