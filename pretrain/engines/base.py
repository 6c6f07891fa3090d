"""What the loop asks of an engine: sharding, precision, gradient sync, clipping and stepping are its business."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.corruption import Corruption
from model.diffusion import LossTerms, StepSchedule

from ..parallel.mesh import Mesh

Tensors = dict[str, dict[str, Tensor]]
"""Canonical state: group (model, exp_avg, exp_avg_sq, ema) -> parameter name -> (sharded) tensor."""


@dataclass(frozen=True)
class Micro:
    """A corrupted batch, ready for the model: a rank's share of a step, or a part of it that fits in memory."""

    batch: Batch
    corruption: Corruption
    step: StepSchedule

    def split(self, num_rows: int) -> "list[Micro]":
        """Parts of at most `num_rows` sequences, as if each had been corrupted alone."""
        starts = range(0, self.batch.num_sequences, num_rows)
        return [
            Micro(self.batch.rows(n, n + num_rows), self.corruption.rows(n, n + num_rows), self.step) for n in starts
        ]

    def to(self, device: torch.device) -> "Micro":
        """The same on another device, without waiting for the copies."""
        return Micro(self.batch.to(device), self.corruption.to(device), self.step)

    def pin_memory(self) -> "Micro":
        """The same in page-locked memory."""
        return Micro(self.batch.pin_memory(), self.corruption.pin_memory(), self.step)


Span = Callable[[str], AbstractContextManager[None]]
"""A context for the time of a phase, by name."""


def unmeasured(phase: str) -> AbstractContextManager[None]:
    """The span of an engine whose time nobody asks for."""
    return nullcontext()


class Engine(Protocol):
    """An engine trains one model on one mesh. The loop knows its axes, never its name.

    span: the loop's, for the phases `forward` and `backward`.
    """

    mesh: Mesh
    num_parameters: int
    span: Span

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """Adds scale x gradient of the summed loss; `last` closes the accumulation. Terms come back detached."""

    def evaluate(self, micro: Micro) -> LossTerms:
        """The loss without gradients or dropout."""

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """Global gradient norm before clipping, on device, with the same bits on every rank, which decide by it."""

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
