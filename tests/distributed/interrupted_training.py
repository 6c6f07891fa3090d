"""Trains several configurations one after the other; to the last rank something may happen in the middle of one.

Usage: torchrun ... interrupted_training.py CONFIG.yaml[=stop|=raise] ...; ends as the last of them does.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.endings import Ending
from pretrain.engines.base import Micro
from pretrain.parallel import mesh
from pretrain.settings import load_config
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.distributed.recorded_training import divided

STEPS_BEFORE = 4
"""Steps that are taken before it happens."""


def interrupt(happens: list[str]) -> None:
    """From now on what `happens` holds befalls the last rank in the step after STEPS_BEFORE."""
    step = Trainer._step

    def interrupted(trainer: Trainer, share: Micro, **counts: Any) -> Tensor:
        world = trainer.mesh.world
        if trainer.state.step == STEPS_BEFORE and world.rank == world.size - 1:
            if happens == ["stop"]:
                os.kill(os.getpid(), signal.SIGTERM)
            if happens == ["raise"]:
                raise RuntimeError("out of memory, as it were")
        return step(trainer, share, **counts)

    Trainer._step = interrupted  # type: ignore[method-assign]


def main(arguments: list[str]) -> Ending:
    """Runs the configurations; how the last one ended."""
    happens: list[str] = []
    interrupt(happens)
    ending = Ending.FINISHED
    with mesh.process_mesh() as whole:
        mesh.process_mesh = partial(divided, whole)  # type: ignore[assignment]
        for argument in arguments:
            path, _, what = argument.partition("=")
            happens[:] = [what]
            ending = train(load_config(Path(path)))
    return ending


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
