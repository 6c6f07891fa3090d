"""Continuous hints in sampling: K trajectories of noisy embeddings that share an estimate of z0 (CADD Algorithm 2).

Shapes: B sequences, R positions of a block, K hints, D width, M masked rows, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from model.diffusion import MaskedDiffusion

from .blocks import BlockView
from .state import SamplerState


@dataclass(frozen=True)
class HintPolicy:
    """How many hints a step averages its predictions over, and how z0 is estimated (CADD Eq. 21)."""

    num_hints: int = 1
    z0: Literal["soft", "hard"] = "hard"

    def __post_init__(self) -> None:
        if self.num_hints < 1:
            raise ValueError(f"num_hints={self.num_hints} must be at least 1")


def begin_hints(model: MaskedDiffusion, state: SamplerState, block: BlockView, policy: HintPolicy) -> SamplerState:
    """Pure noise at every position of a block that begins."""
    if model.augmentation is None:
        return state
    shape = (block.stop - block.start, model.config.backbone.dim)
    return replace(state, hints_KBRD=_noise(state, "first hint", shape, policy.num_hints))


def next_hints(
    model: MaskedDiffusion, state: SamplerState, z0_MD: Tensor, rows_M: Tensor, t: float, s: float
) -> SamplerState:
    """Moves all hints from time t to s towards the estimate z0_MD at the block's flattened rows_M."""
    if model.augmentation is None or s <= 0.0:
        return state
    assert state.hints_KBRD is not None
    hints = state.hints_KBRD
    z0_BRD = torch.zeros_like(hints[0]).flatten(0, 1).index_copy(0, rows_M, z0_MD.to(hints.dtype)).view_as(hints[0])
    times = torch.tensor([t, s], dtype=torch.float64, device=hints.device)
    noise = _noise(state, "next hint", hints.shape[2:], hints.shape[0])
    return replace(state, hints_KBRD=model.augmentation.step(hints, z0_BRD, times[0], times[1], noise))


def average(log_probs: list[Tensor]) -> Tensor:
    """Log of the mean of K predictions [M, V] (CADD Eq. 5, with its 1/K)."""
    return reduce(torch.logaddexp, log_probs) - math.log(len(log_probs))


def _noise(state: SamplerState, name: str, shape: tuple[int, ...], num_hints: int) -> Tensor:
    stream = state.step_key.stream(name)
    return torch.stack([stream.fold(k).normal(*shape) for k in range(num_hints)])
