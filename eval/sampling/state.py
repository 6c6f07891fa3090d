"""Where a batch of samples stands between two denoising steps.

Shapes: B sequences, L positions.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from model.noise import NoiseKey


@dataclass(frozen=True)
class SamplerState:
    """Tokens, what is still hidden, and the key of all draws.

    Args:
        tokens_BL: token ids, the mask id where hidden.
        masked_BL: positions still to be revealed, bool.
        step: denoising steps done.
        key: seed and sample indices; its step is set by the loop, so a sample does not depend on its batch.
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    step: int
    key: NoiseKey

    @classmethod
    def start(cls, tokens_BL: Tensor, masked_BL: Tensor, *, mask_id: int, seed: int, first_index: int = 0) -> Self:
        """All of `masked_BL` hidden; sample n of the batch is number first_index + n of its seed."""
        index_B = torch.arange(first_index, first_index + tokens_BL.shape[0], device=tokens_BL.device)
        hidden_BL = tokens_BL.masked_fill(masked_BL, mask_id)
        return cls(hidden_BL, masked_BL, 0, NoiseKey(seed, 0, index_B))

    def reveal(self, revealed_BL: Tensor, tokens_BL: Tensor) -> Self:
        """The state after a step that put `tokens_BL` at `revealed_BL`."""
        return replace(
            self,
            tokens_BL=torch.where(revealed_BL, tokens_BL, self.tokens_BL),
            masked_BL=self.masked_BL & ~revealed_BL,
            step=self.step + 1,
        )
