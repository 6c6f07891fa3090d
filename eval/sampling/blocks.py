"""The network's view of a block: which tokens it is given, what it may see, what it leaves in the cache.

Shapes: B sequences, L positions, R positions of a block, S blocks begun, D width, d latent width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import KVCache
from model.diffusion import MaskedDiffusion

from .state import SamplerState


@dataclass(frozen=True)
class BlockView:
    """Block number `index` of a canvas; without block_size the canvas is the only one.

    Args:
        start: its first position.
        stop: one past its last.
        cached: read earlier blocks from the cache instead of computing them anew.
    """

    index: int
    start: int
    stop: int
    cached: bool

    def denoise(self, model: MaskedDiffusion, state: SamplerState, t: float, hint_BRD: Tensor | None) -> Tensor:
        """Hidden states [B, R, D] of the block at time t."""
        if self.cached and state.cache is not None:
            return self._own(model, state, t, hint_BRD, state.cache.reading())
        x_BL = state.tokens_BL[:, : self.stop]
        t_S = torch.zeros(self.index + 1, dtype=torch.float64, device=x_BL.device)
        t_S[-1] = t
        hint = None if hint_BRD is None else F.pad(hint_BRD, (0, 0, self.start, 0))
        hidden = model.denoise(x_BL, t=t_S.expand(x_BL.shape[0], -1), hint=hint, latent=state.latent_BSd)
        return hidden[:, self.start :]

    def remember(self, model: MaskedDiffusion, state: SamplerState) -> SamplerState:
        """The finished block's keys and values, computed under its own latent, join the cache."""
        if not self.cached:
            return state
        cache = state.cache or KVCache()
        width = model.config.backbone.dim
        hint = None
        if model.augmentation is not None:
            hint = torch.zeros(state.tokens_BL.shape[0], self.stop - self.start, width, device=state.tokens_BL.device)
        self._own(model, state, 0.0, hint, cache)
        return replace(state, cache=cache)

    def _own(
        self, model: MaskedDiffusion, state: SamplerState, t: float, hint_BRD: Tensor | None, cache: KVCache
    ) -> Tensor:
        x_BR = state.tokens_BL[:, self.start : self.stop]
        t_B = torch.full((x_BR.shape[0],), t, dtype=torch.float64, device=x_BR.device)
        latent = None if state.latent_BSd is None else state.latent_BSd[:, -1:]
        return model.denoise(x_BR, t=t_B, hint=hint_BRD, latent=latent, cache=cache)


def blocks_of(model: MaskedDiffusion, length: int, *, cached: bool) -> list[BlockView]:
    """The blocks of a canvas, left to right.

    Raises:
        ValueError: the canvas is not a whole number of blocks.
    """
    size = model.config.block_size or length
    if length % size:
        nearest = -(-length // size) * size
        raise ValueError(f"a canvas of {length} is not a whole number of blocks of {size}: use a length of {nearest}")
    starts = range(0, length, size)
    cached = cached and len(starts) > 1
    return [BlockView(index, start, start + size, cached) for index, start in enumerate(starts)]
