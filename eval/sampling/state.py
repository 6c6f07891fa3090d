"""Where a batch of samples stands between two denoising steps.

Shapes: B sequences, L positions, R positions of the current block, S blocks begun, K hints, D width, d latent width.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from model.attention import KVCache
from model.noise import NoiseKey


@dataclass(frozen=True)
class SamplerState:
    """Tokens, what is still hidden, and all that the next step builds on.

    Args:
        tokens_BL: token ids, the mask id where hidden.
        masked_BL: positions still to be revealed, bool.
        maskable_BL: positions that were hidden at the start, bool.
        step: denoising steps done, over all blocks.
        key: seed and sample indices; its step is set by the loop, so a sample does not depend on its batch.
        latent_BSd: z of each block begun so far; None for models without.
        guess_BL: the newest prediction of every token, for latents that are refreshed.
        hints_KBRD: noisy embeddings z_t of the current block, K trajectories; None for models without.
        cache: keys and values of finished blocks; None without blocks.
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    maskable_BL: Tensor
    step: int
    key: NoiseKey
    latent_BSd: Tensor | None = None
    guess_BL: Tensor | None = None
    hints_KBRD: Tensor | None = None
    cache: KVCache | None = None

    @classmethod
    def start(cls, tokens_BL: Tensor, masked_BL: Tensor, *, mask_id: int, seed: int, first_index: int = 0) -> Self:
        """All of `masked_BL` hidden; sample n of the batch is number first_index + n of its seed."""
        index_B = torch.arange(first_index, first_index + tokens_BL.shape[0], device=tokens_BL.device)
        hidden_BL = tokens_BL.masked_fill(masked_BL, mask_id)
        return cls(hidden_BL, masked_BL, masked_BL, 0, NoiseKey(seed, 0, index_B))

    @property
    def step_key(self) -> NoiseKey:
        """The key of this step's draws."""
        return replace(self.key, step=self.step)

    def reveal(self, revealed_BL: Tensor, tokens_BL: Tensor) -> Self:
        """The state after a step that put `tokens_BL` at `revealed_BL`."""
        return replace(
            self,
            tokens_BL=torch.where(revealed_BL, tokens_BL, self.tokens_BL),
            masked_BL=self.masked_BL & ~revealed_BL,
            step=self.step + 1,
        )

    def rows(self, index_B: Tensor) -> Self:
        """The state of some of the sequences."""
        return replace(
            self,
            tokens_BL=self.tokens_BL[index_B],
            masked_BL=self.masked_BL[index_B],
            maskable_BL=self.maskable_BL[index_B],
            key=replace(self.key, index_B=self.key.index_B[index_B]),
            latent_BSd=None if self.latent_BSd is None else self.latent_BSd[index_B],
            guess_BL=None if self.guess_BL is None else self.guess_BL[index_B],
            hints_KBRD=None if self.hints_KBRD is None else self.hints_KBRD[:, index_B],
            cache=None if self.cache is None else self.cache.rows(index_B),
        )

    def with_tokens(self, index_B: Tensor, part: Self) -> Self:
        """This state with the tokens of some sequences taken from their own state."""
        return replace(
            self,
            tokens_BL=self.tokens_BL.index_copy(0, index_B, part.tokens_BL),
            masked_BL=self.masked_BL.index_copy(0, index_B, part.masked_BL),
            step=part.step,
        )
