"""How many positions each row reveals in a step.

Shapes: B sequences, L positions.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.config import ScheduleConfig
from model.corruption import MaskSchedule
from model.noise import NoiseKey


class Amount(Protocol):
    """A policy of the sampler."""

    def __call__(self, masked_BL: Tensor, step: int, steps: int, key: NoiseKey) -> Tensor:
        """Counts [B], at most the number still masked; the last step reveals everything."""


@dataclass(frozen=True)
class Ancestral:
    """Each masked position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) (VADD Eq. 1)."""

    schedule: ScheduleConfig

    def __call__(self, masked_BL: Tensor, step: int, steps: int, key: NoiseKey) -> Tensor:
        """See Amount."""
        schedule = MaskSchedule(self.schedule)
        times = torch.tensor([1.0 - step / steps, 1.0 - (step + 1) / steps], dtype=torch.float64)
        alpha_t, alpha_s = schedule.alpha(times).tolist()
        flip = 1.0 if step + 1 == steps else (alpha_s - alpha_t) / (1.0 - alpha_t)
        draws_BL = key.stream("amount").uniform(masked_BL.shape[1])
        return (masked_BL & (draws_BL < flip)).sum(1)


@dataclass(frozen=True)
class Even:
    """The same number every step, as nearly as the rows' own counts allow."""

    def __call__(self, masked_BL: Tensor, step: int, steps: int, key: NoiseKey) -> Tensor:
        """See Amount."""
        return -(-masked_BL.sum(1) // (steps - step))


@dataclass(frozen=True)
class Cosine:
    """Few while little is known, many at the end: cos(pi / 2 * i / steps) stay masked after i steps.

    The schedule of MaskGIT (Chang et al. 2022). Where early tokens decide later ones, as in a
    puzzle, the same number of steps errs less.
    """

    def __call__(self, masked_BL: Tensor, step: int, steps: int, key: NoiseKey) -> Tensor:
        """See Amount."""
        now, then = (math.cos(math.pi / 2 * i / steps) for i in (step, step + 1))
        masked_B = masked_BL.sum(1)
        return masked_B - (masked_B * (then / now)).floor().long()
