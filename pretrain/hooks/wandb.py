"""Weights & Biases, where a project is configured; WANDB_MODE=offline keeps it on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.bounds import Bound

from ..config import RunConfig
from ..state import TrainState
from .base import Hook, StepRecord


class WandbRun(Hook):
    """Logs the train and validation lines to one W&B run, continued after a resume."""

    def __init__(self, config: RunConfig, settings: dict[str, Any]) -> None:
        self.config, self.settings = config, settings

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Opens the run; its id is the folder's name, so a resume continues it."""
        import wandb

        folder: Path = self.config.path
        self.run = wandb.init(
            project=self.config.log.wandb_project,
            name=self.config.name,
            id=folder.name,
            dir=folder,
            resume="allow",
            config=self.settings,
        )

    def on_log(self, record: StepRecord) -> None:
        """Train metrics."""
        values = {f"train/{k}": v for k, v in asdict(record).items() if k != "step" and v is not None}
        self.run.log(values, step=record.step)

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """The bound."""
        self.run.log({"validation/nelbo": bound.nelbo, "validation/nelbo_error": bound.error}, step=state.step)

    def on_finish(self, state: TrainState) -> None:
        """Closes the run."""
        self.run.finish()
