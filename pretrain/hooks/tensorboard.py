"""TensorBoard's event files in RUN/tensorboard, where log.tensorboard is set."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from model.bounds import Bound

from ..state import TrainState
from .base import Hook, StepRecord


class TensorBoardFiles(Hook):
    """Writes the train and validation lines; what a resume or a rollback makes void is taken back.

    After a full disk it goes on in a new file, from the next checkpoint; what the old one had not written is lost.

    Args:
        folder: RUN/tensorboard.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "log.tensorboard=true needs the package tensorboard, which is not installed: "
                "pip install 'penumbra-diffusion[tensorboard]', or set log.tensorboard=false"
            ) from None
        self.folder, self.open = folder, SummaryWriter
        self.writer: SummaryWriter | None = None

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Opens a file; steps past the state's are taken back."""
        self.writer = self.open(str(self.folder), purge_step=state.step + 1)

    def on_log(self, record: StepRecord) -> None:
        """Train metrics."""
        numbers = record.numbers()
        self._add({f"train/{name}": value for name, value in numbers.items() if name != "step"}, record.step)

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """The bound."""
        self._add({f"validation/{bound.kind}": bound.value}, state.step)

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """A disk that was full has room now: a new file."""
        if self.writer is None:
            self.writer = self.open(str(self.folder))

    def on_rollback(self, state: TrainState, *, spike: int) -> None:
        """A new file, which takes the lost steps back."""
        try:
            self._close()
        finally:
            self.on_start(state, resumed=True)

    def on_finish(self, state: TrainState) -> None:
        """Closes the file."""
        self._close()

    def on_stop(self, state: TrainState, reason: str) -> None:
        """Closes the file."""
        self._close()

    def _add(self, numbers: Mapping[str, float | None], step: int) -> None:
        if self.writer is None:
            return
        try:
            for name, value in numbers.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)
        except OSError:
            with suppress(OSError):
                self._close()
            raise

    def _close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
