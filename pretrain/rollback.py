"""Where a run goes back to after a spike: a checkpoint that it would have had however often it was interrupted."""

from pathlib import Path

from .checkpoint.load import CHECKPOINTS, newest_good
from .config import RunConfig
from .parallel.mesh import Axis


def rollback_target(config: RunConfig, world: Axis) -> Path | None:
    """The newest good checkpoint of the schedule (checkpoint.every); None: there is none yet.

    Those that a stop left in between do not count: what a run computes does not depend on when it was stopped.
    """
    folder, every = config.path / CHECKPOINTS, config.checkpoint.every

    def of_schedule(path: Path) -> bool:
        step = int(path.name.removeprefix("step-"))
        return step > 0 and every > 0 and step % every == 0

    return newest_good(folder, world, wanted=of_schedule)
