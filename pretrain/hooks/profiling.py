"""Traces of single steps, and the history of a GPU's memory."""

from pathlib import Path

import torch

from ..state import TrainState
from .base import Hook


class Profiler(Hook):
    """PyTorch's profiler on chosen steps; chrome://tracing, Perfetto and TensorBoard read RUN/profiles/step-N.json.gz.

    Args:
        folder: RUN/profiles.
        steps: which, counted from 1.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, frozenset(steps)

    def on_step_start(self, step: int) -> None:
        """Starts a trace."""
        if step in self.steps:
            kinds = torch.profiler.ProfilerActivity
            activities = [kinds.CPU, kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]
            self.profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self.profile.start()

    def on_step_end(self, step: int) -> None:
        """Waits for the device and writes the trace."""
        if step in self.steps:
            self.profile.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"step-{step}.tmp.json.gz"
            self.profile.export_chrome_trace(str(partial))
            partial.replace(self.folder / f"step-{step}.json.gz")


class MemorySnapshot(Hook):
    """The CUDA allocator's history, for https://pytorch.org/memory_viz: to the end of a step, or to an error.

    Args:
        folder: RUN/profiles.
        rank: for the name of the file.
        step: counted from 1.
        device: where the run computes.

    Raises:
        ValueError: there is no GPU.
    """

    EVENTS = 1_000_000

    def __init__(self, folder: Path, rank: int, step: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"log.memory_snapshot={step} needs a GPU, this run computes on the {device.type}: set it to 0"
            )
        self.folder, self.rank, self.step = folder, rank, step

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Starts to record."""
        self.recording = state.step < self.step
        if self.recording:
            torch.cuda.memory._record_memory_history(max_entries=self.EVENTS)

    def on_step_end(self, step: int) -> None:
        """Writes the history."""
        if step == self.step:
            self._write(f"step-{step}")

    def on_error(self, error: BaseException) -> None:
        """Writes what led to an error, which may be that memory ran out."""
        self._write("error")

    def _write(self, until: str) -> None:
        if self.recording:
            self.recording = False
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"memory-rank-{self.rank}-{until}.pickle"
            partial = path.with_suffix(".tmp")
            torch.cuda.memory._dump_snapshot(str(partial))
            partial.replace(path)
            torch.cuda.memory._record_memory_history(enabled=None)
