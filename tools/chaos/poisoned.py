"""A run in which one step goes wrong on one rank, or whose update is left out: what torchrun starts for such trials.

Usage: torchrun ... -m tools.chaos.poisoned CONFIG.yaml STEP RANK|none
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.config import ModelConfig
from model.diffusion import LossTerms
from pretrain import engines
from pretrain.config import RunConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Mesh
from pretrain.settings import load_config
from pretrain.train import train


class PoisonedEngine(FsdpEngine):
    """In one step the gradients that one rank holds are not numbers; or every rank leaves the update out, unasked.

    Args:
        step: which one, counted from 1.
        rank: whose gradients, or None to leave the update out.
    """

    def __init__(self, config: RunConfig, model: ModelConfig, mesh: Mesh, *, step: int, rank: int | None) -> None:
        super().__init__(model, config.optim, config.train, config.parallel, mesh, seed=config.seed)
        self.poisoned_step, self.poisoned_rank = step, rank
        self.rows, self.current = config.batch_rows, 0

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """See Engine."""
        self.current = int(micro.batch.index_B[0]) // self.rows + 1
        return super().forward_backward(micro, scale=scale, last=last)

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine."""
        if self.current == self.poisoned_step and self.mesh.world.rank == self.poisoned_rank:
            for parameter in self.parameters.values():
                gradient = parameter.grad
                if gradient is not None:
                    (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(torch.nan)
        return super().reduce_and_clip(max_norm)

    def step(self, *, lr: float, take: Tensor) -> None:
        """See Engine."""
        super().step(lr=lr, take=self._taken(take))

    def update_ema(self, decay: float, *, take: Tensor) -> None:
        """See Engine."""
        super().update_ema(decay, take=self._taken(take))

    def _taken(self, take: Tensor) -> Tensor:
        leave_out = self.poisoned_rank is None and self.current == self.poisoned_step
        return torch.zeros_like(take) if leave_out else take


def main(path: str, step: str, rank: str) -> None:
    """Trains."""
    poisoned_rank = None if rank == "none" else int(rank)
    engines.make_engine = partial(PoisonedEngine, step=int(step), rank=poisoned_rank)
    sys.exit(train(load_config(Path(path))))


if __name__ == "__main__":
    main(*sys.argv[1:])
