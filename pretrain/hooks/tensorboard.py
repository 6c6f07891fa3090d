"""TensorBoard's event files in RUN/tensorboard, where log.tensorboard is set."""

from pathlib import Path

from model.bounds import Bound

from ..state import TrainState
from .base import Hook, StepRecord


class TensorBoardFiles(Hook):
    """Writes the train and validation lines; what a resume or a rollback makes void is taken back.

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

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Opens a file; steps past the state's are taken back."""
        self.writer = self.open(str(self.folder), purge_step=state.step + 1)

    def on_log(self, record: StepRecord) -> None:
        """Train metrics."""
        for name, value in record.numbers().items():
            if name != "step" and value is not None:
                self.writer.add_scalar(f"train/{name}", value, record.step)

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """The bound."""
        self.writer.add_scalar(f"validation/{bound.kind}", bound.value, state.step)

    def on_rollback(self, state: TrainState, *, spike: int) -> None:
        """A new file, which takes the lost steps back."""
        self.writer.close()
        self.on_start(state, resumed=True)

    def on_finish(self, state: TrainState) -> None:
        """Closes the file."""
        self.writer.close()

    def on_stop(self, state: TrainState, reason: str) -> None:
        """Closes the file."""
        self.writer.close()
