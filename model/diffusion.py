"""The masked diffusion model: one loss over corrupted batches, one denoiser for samplers.

Shapes: B sequences, L positions, D width, V vocabulary, M masked rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention import KVCache
from .batch import Batch
from .config import ModelConfig
from .corruption import Corruption
from .masks import MaskSpec
from .noise import Stream
from .transformer import Transformer


@dataclass(frozen=True)
class StepSchedule:
    """What the training loop derives from the step and the model must know; each switch adds its own field."""


@dataclass(frozen=True)
class LossTerms:
    """Sums over a micro-batch, never means; the loop divides by global counts.

    Args:
        loss: weighted sum, differentiable.
        cross_entropy: unweighted sum over masked positions, nats.
        loss_B: each sequence's part of `loss`, detached.
    """

    loss: Tensor
    cross_entropy: Tensor
    loss_B: Tensor


class Denoiser(Protocol):
    """What predicts hidden tokens: a network, and a head that runs only on the rows one needs."""

    def __call__(
        self,
        x_t: Tensor,
        *,
        t: Tensor | None = None,
        mask: MaskSpec | None = None,
        hint: Tensor | None = None,
        condition: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        dropout: Stream | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of token ids [B, L] or input embeddings [B, L, D]."""

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """Logits [M, V]; `rows_M` index the flattened positions, for heads that depend on them."""

    def cross_entropy(
        self, hidden_MD: Tensor, rows_M: Tensor, targets_M: Tensor, weight_M: Tensor, *, forbidden: int
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies, differentiable, and each row's own, in nats."""


class MaskedDiffusion(nn.Module):
    """A denoiser and its objective (MDLM; Sahoo et al. 2024, VADD Eq. 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1 or config.mask_id < 0:
            raise ValueError(
                f"vocab_size={config.vocab_size}, mask_id={config.mask_id}: set both, or take the tokenizer's "
                "with config.with_vocabulary"
            )
        self.config = config
        self.denoiser = Transformer(config.backbone, config.vocab_size, time_conditioning=config.time_conditioning)

    def forward(self, batch: Batch, corruption: Corruption, *, step: StepSchedule) -> LossTerms:
        """The training entry: the loss of one corrupted micro-batch."""
        dropout = corruption.key.stream("dropout") if self.training else None
        hidden_BLD = self.denoiser(
            corruption.x_t_BL,
            t=corruption.t_BS,
            mask=MaskSpec(document_BL=batch.document_BL),
            positions=batch.positions_BL,
            dropout=dropout,
        )
        hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, corruption.rows_M)
        loss, ce_M = self.denoiser.cross_entropy(
            hidden_MD, corruption.rows_M, corruption.targets_M, corruption.weight_M, forbidden=self.config.mask_id
        )
        loss_B = ce_M.new_zeros(hidden_BLD.shape[0]).index_add_(0, corruption.sequence_M, ce_M * corruption.weight_M)
        return LossTerms(loss=loss, cross_entropy=ce_M[: corruption.num_masked].sum(), loss_B=loss_B)

    def denoise(
        self,
        x_t: Tensor,
        *,
        t: Tensor | None = None,
        mask: MaskSpec | None = None,
        hint: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of a partly masked sequence, for samplers."""
        hidden: Tensor = self.denoiser(x_t, t=t, mask=mask, hint=hint, cache=cache, positions=positions)
        return hidden

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """Logits [M, V] in float32, the mask's own at minus infinity."""
        logits_MV = self.denoiser.logits(hidden_MD, rows_M).float()
        logits_MV[:, self.config.mask_id] = -torch.inf
        return logits_MV
