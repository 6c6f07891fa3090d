"""Trains several configurations one after the other; in each, rank 1's gradient of batch 5 is not a number.

Usage: torchrun ... poisoned_training.py CONFIG.yaml ...
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.diffusion import LossTerms
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel import mesh
from pretrain.settings import load_config
from pretrain.train import train

BATCH = 5
ROWS = 16


def poison() -> None:
    """From now on the last rank spoils its shard of the gradient after its part of that batch."""
    forward_backward, reduce_and_clip = FsdpEngine.forward_backward, FsdpEngine.reduce_and_clip
    batches = [-1]

    def recording(engine: FsdpEngine, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        batches[0] = int(micro.batch.index_B[0]) // ROWS
        return forward_backward(engine, micro, scale=scale, last=last)

    def poisoned(engine: FsdpEngine, max_norm: float) -> Tensor:
        world = engine.mesh.world
        if batches[0] == BATCH and world.rank == world.size - 1:
            for parameter in engine.parameters.values():
                gradient = parameter.grad
                assert gradient is not None
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.fill_(torch.nan)
        return reduce_and_clip(engine, max_norm)

    FsdpEngine.forward_backward = recording  # type: ignore[method-assign, assignment]
    FsdpEngine.reduce_and_clip = poisoned  # type: ignore[method-assign]


def main(paths: list[str]) -> None:
    """Runs the configurations."""
    poison()
    with mesh.process_mesh() as devices:
        mesh.process_mesh = lambda parallel=None: contextlib.nullcontext(devices)  # type: ignore[assignment, misc]
        for path in paths:
            train(load_config(Path(path)))


if __name__ == "__main__":
    main(sys.argv[1:])
