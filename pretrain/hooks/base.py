"""What a hook may hear about a run; every hook runs on rank 0 unless it says otherwise."""

from dataclasses import dataclass
from pathlib import Path

from model.bounds import Bound
from model.collapse import LatentReport

from ..state import TrainState


@dataclass(frozen=True)
class StepRecord:
    """One log line.

    Args:
        step: optimizer steps finished.
        loss: weighted sum over the global batch divided by its count, nats.
        ce: mean cross-entropy at masked positions, nats.
        grad_norm: global norm before clipping.
        lr: learning rate of the step.
        tokens: input tokens seen since the run began.
        skipped: updates not taken since the run began.
        tokens_per_second: input tokens over the wall time since the last line, over all ranks.
        mfu: model FLOPs utilisation of a rank, or None where the peak is unknown.
        latent: what the latents of the step say, or None without latents.
    """

    step: int
    loss: float
    ce: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: int
    tokens_per_second: float
    mfu: float | None
    latent: LatentReport | None = None


class Hook:
    """Override what you want to hear."""

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Before the first step of this process."""

    def on_log(self, record: StepRecord) -> None:
        """Every log.every steps."""

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """After a validation."""

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """After a checkpoint is sealed."""

    def on_finish(self, state: TrainState) -> None:
        """After the last step."""
