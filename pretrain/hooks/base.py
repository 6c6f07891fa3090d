"""What a hook may hear about a run. Most hooks live on rank 0; those of `rank_hooks` in train.py on every rank."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model.bounds import Bound
from model.collapse import LatentReport

from ..notice import notice
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
        peak_memory: the most bytes that this rank has held.
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
    peak_memory: int = 0

    def numbers(self) -> dict[str, float | None]:
        """Every number of the line by its name, those of the latents among them."""
        latent = {} if self.latent is None else asdict(self.latent)
        return {**{name: value for name, value in asdict(self).items() if name != "latent"}, **latent}


class Hook:
    """Override what you want to hear. Steps count from 1, as in the log."""

    refused: str = ""
    """What the disk last said to it."""

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Before the first step of this process."""

    def on_alive(self) -> None:
        """Before every step and every batch of a validation, whenever all ranks have got there."""

    def on_step_start(self, step: int) -> None:
        """Before the forward pass of a step."""

    def on_step_end(self, step: int) -> None:
        """When the step's work has been handed to the device, which may not have done it yet."""

    def on_log(self, record: StepRecord) -> None:
        """Every log.every steps."""

    def on_validation(self, bound: Bound, state: TrainState) -> None:
        """After a validation."""

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """After a checkpoint is sealed."""

    def on_rollback(self, state: TrainState, *, spike: int) -> None:
        """After a spike in step `spike` has sent the run back to where `state` stands."""

    def on_finish(self, state: TrainState) -> None:
        """After the last step."""

    def on_stop(self, state: TrainState, reason: str) -> None:
        """In the place of on_finish, where the run ends before its last step."""

    def on_error(self, error: BaseException) -> None:
        """In the place of on_finish, where it ends with an error."""


def tell(hooks: Sequence[Hook], event: Callable[[Hook], None]) -> None:
    """Lets each of them hear it; what a full or broken disk does not take from a hook is lost, and the run goes on."""
    for hook in hooks:
        try:
            event(hook)
        except OSError as error:
            if hook.refused != str(error):
                notice(f"{type(hook).__name__} could not write ({error}): training goes on without it")
            hook.refused = str(error)
