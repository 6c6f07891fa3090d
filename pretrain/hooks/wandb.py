"""Weights & Biases, where a project is configured; WANDB_MODE=offline keeps it on this machine."""

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.bounds import Bound

from ..checkpoint.manifest import write_synced
from ..config import RunConfig
from ..state import TrainState
from .base import Hook, StepRecord


class WandbRun(Hook):
    """Logs the train and validation lines to one W&B run, continued after a resume.

    Args:
        config: the run's configuration, sent whole.
        about: facts sent with it: the number of parameters.
    """

    def __init__(self, config: RunConfig, about: dict[str, Any]) -> None:
        self.config, self.about = config, about
        self.run: Any = None

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Opens the run under the id kept in its folder, so that a resume continues it."""
        import wandb

        folder: Path = self.config.path
        self.run = wandb.init(
            project=self.config.log.wandb_project,
            name=self.config.name,
            id=_kept_id(folder / "wandb_id"),
            dir=folder,
            resume="allow",
            config={**asdict(self.config), **self.about},
        )
        self.run.define_metric("*", step_metric="step")

    def on_log(self, record: StepRecord) -> None:
        """Train metrics."""
        values = {f"train/{k}": v for k, v in record.numbers().items() if k != "step" and v is not None}
        self._log(values, record.step)

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """The bound."""
        values = {f"validation/{bound.kind}": bound.value, f"validation/{bound.kind}_error": bound.error}
        self._log(values, state.step)

    def on_finish(self, state: TrainState) -> None:
        """Closes the run."""
        self._close()

    def on_stop(self, state: TrainState, reason: str) -> None:
        """Closes the run."""
        self._close()

    def _log(self, values: dict[str, float], step: int) -> None:
        """Over a step of our own, which may go back; nothing where a full disk has kept the run from opening."""
        if self.run is not None:
            self.run.log({**values, "step": step})

    def _close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _kept_id(path: Path) -> str:
    """The id in a file, which is drawn and written once: two runs of one name are two runs at W&B."""
    if not path.is_file():
        partial = path.with_name(f"{path.name}.tmp")
        write_synced(partial, secrets.token_hex(8))
        partial.replace(path)
    return path.read_text().strip()
