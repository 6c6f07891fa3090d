"""What the loop asks of an engine: sharding, precision, gradient sync, clipping and stepping are its business."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.batch import Batch
from model.corruption import Corruption
from model.diffusion import LossTerms, StepSchedule

from ..parallel.mesh import DataAxis

Tensors = dict[str, dict[str, Tensor]]
"""Canonical state: group (model, exp_avg, exp_avg_sq, ema) -> parameter name -> (sharded) tensor."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch, ready for the model."""

    batch: Batch
    corruption: Corruption
    step: StepSchedule


class Engine(Protocol):
    """An engine trains one model on one mesh."""

    data_axis: DataAxis

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """Adds scale x gradient of the summed loss; `last` closes the accumulation. Terms come back detached."""

    def evaluate(self, micro: Micro) -> LossTerms:
        """The loss without gradients or dropout."""

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """Global gradient norm before clipping, on device."""

    def step(self, *, lr: float, take: Tensor) -> None:
        """One optimizer update and cleared gradients; take = 0 skips the update on every rank."""

    def update_ema(self, decay: float, *, take: Tensor) -> None:
        """Moves the average of the weights."""

    def ema(self) -> AbstractContextManager[None]:
        """Swaps the averaged weights in, where there are any."""

    def state_dict(self) -> Tensors:
        """The tensors of a checkpoint, to be read or to be loaded into in place."""

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """Takes over loaded tensors and the number of updates that the optimizer has made."""
