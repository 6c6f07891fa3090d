"""Exports for transformers while training goes on, from checkpoints that have just been sealed."""

import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from ..checkpoint.hf import REPLACED, UNFINISHED, ExportSettings, export
from ..checkpoint.saver import own_group
from ..config import RunConfig
from ..parallel.mesh import Axis
from ..state import TrainState
from .base import Hook


class Exports(Hook):
    """Writes RUN/exports/step-N, in the run's own precision, in a thread that no save waits for.

    Every rank has one, and they divide the files among them. One that fails is named on stderr, and the run goes on;
    one that is under way when the run is stopped is given up.
    """

    def __init__(self, config: RunConfig, world: Axis) -> None:
        self.folder, self.last = config.path / "exports", config.train.steps
        self.every, self.settings = config.checkpoint.export_every, ExportSettings(dtype=config.train.precision)
        self.world, self.axis = world, own_group(world)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="export")
        self.given_up = threading.Event()

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Removes what a killed process has left."""
        if self.axis.rank == 0:
            for ending in (UNFINISHED, REPLACED):
                for leftover in self.folder.glob(f"step-*{ending}"):
                    shutil.rmtree(leftover, ignore_errors=True)

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """Begins an export where one is due."""
        if state.step % self.every == 0 or state.step == self.last:
            self.thread.submit(self._export, path, state.step)

    def on_finish(self, state: TrainState) -> None:
        """Waits for those that have begun."""
        self._end()

    def on_stop(self, state: TrainState, reason: str) -> None:
        """Gives up what has begun: whoever stops a run does not wait long."""
        self.given_up.set()
        self._end()

    def on_error(self, error: BaseException) -> None:
        """Gives up what has begun; other ranks may never answer."""
        self.given_up.set()
        self.thread.shutdown(wait=False)

    def _export(self, checkpoint: Path, step: int) -> None:
        out = self.folder / checkpoint.name
        try:
            export(checkpoint, out, self.settings, self.axis, before_each=self._go_on)
        except Exception as error:  # whatever it is, the run does not need this folder
            reason = f"({error}): `penumbra export {self.folder.parent} OUT --step {step}` makes one"
            if not checkpoint.is_dir():
                reason = "(its checkpoint was removed meanwhile): raise checkpoint.keep"
            self._say(f"no export of step {step} in {out} {reason}", sys.stderr)
        else:
            self._say(f"exported step {step} to {out}", sys.stdout)

    def _go_on(self) -> None:
        if self.given_up.is_set():
            raise InterruptedError("the run was stopped")

    def _say(self, text: str, stream: TextIO) -> None:
        if self.axis.rank == 0:
            print(f"penumbra: {text}", file=stream, flush=True)

    def _end(self) -> None:
        """No rank leaves while others are in an export's last collective."""
        self.thread.shutdown()
        self.world.barrier()
        if self.axis.group is not self.world.group:
            dist.destroy_process_group(self.axis.group)
