"""The masked diffusion model: one loss over corrupted batches, one denoiser for samplers.

Shapes: B sequences, L positions, S segments, D width, d latent width, V vocabulary, M masked rows.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import KVCache
from .augmentation import Augmentation, loudness
from .batch import Batch
from .config import ModelConfig, PointMlpConfig, TransformerConfig
from .corruption import Corruption, MaskSchedule, shift_right
from .latent import EarlierBlocksPrior, Gaussian, Latent, standard_normal
from .latent_draw import LatentDraw, divergence, draw_in_turn
from .masks import Annealing, MaskSpec
from .noise import Stream
from .point_mlp import PointMlp
from .transformer import Transformer

CHUNK_ELEMENTS = 1 << 23
"""Most logits at once where they are needed whole."""


@dataclass(frozen=True)
class StepSchedule:
    """What the training loop derives from the step and the model must know.

    Args:
        kl_weight: multiplies the KL of the latents (VADD Eq. 11).
        annealing: how far the denoiser's attention has opened, where it does not see everything yet.
        statistics: whether the step is logged, so that sums about the latents are wanted.
    """

    kl_weight: float = 1.0
    annealing: Annealing | None = None
    statistics: bool = False


@dataclass(frozen=True)
class LossTerms:
    """Sums over a micro-batch, never means; the loop divides by global counts.

    Args:
        loss: weighted sum, differentiable.
        cross_entropy: unweighted sum over masked positions, nats.
        loss_B: each sequence's part of `loss` (without the MSE term), detached.
        latent_sums: of `collapse.posterior_sums`, on steps with statistics.
    """

    loss: Tensor
    cross_entropy: Tensor
    loss_B: Tensor
    latent_sums: Tensor | None = None


class Denoiser(Protocol):
    """What predicts hidden tokens: an embedding, a network, and a head that runs only on the rows one needs."""

    embed: nn.Embedding

    def __call__(
        self,
        x_t: Tensor,
        *,
        t: Tensor | None = None,
        mask: MaskSpec | None = None,
        hint: Tensor | None = None,
        condition: Tensor | None = None,
        applies: Tensor | None = None,
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
    """A denoiser and its objective (MDLM; Sahoo et al. 2024, VADD Eq. 3), with the three switches.

    Blocks divide the sequence, a latent ties hidden tokens together, hints say something about each of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1 or config.mask_id < 0:
            raise ValueError(
                f"vocab_size={config.vocab_size}, mask_id={config.mask_id}: set both, or take the tokenizer's "
                "with config.with_vocabulary"
            )
        self.config = config
        self.schedule = MaskSchedule(config.schedule)
        backbone = config.backbone
        make = PointMlp if isinstance(backbone, PointMlpConfig) else Transformer
        self.denoiser = make(backbone, config.vocab_size, time_conditioning=config.time_conditioning)  # type: ignore[arg-type]
        self.latent = Latent(config) if config.latent is not None else None
        self.augmentation = (
            Augmentation(config.augmentation, backbone.dim, config.vocab_size) if config.augmentation else None
        )

    def forward(self, batch: Batch, corruption: Corruption, *, step: StepSchedule) -> LossTerms:
        """The training entry: the loss of one corrupted micro-batch."""
        hint_BLD = None if self.augmentation is None else self.draw_hint(corruption)
        num_samples = 1 if self.config.latent is None else self.config.latent.num_samples
        draw = None if self.latent is None else self.draw_latent(batch, corruption, num_samples)
        sums = draw.sums(corruption.hidden_BS) if draw is not None and step.statistics else None
        if num_samples > 1:
            batch, corruption = batch.repeated(num_samples), corruption.repeated(num_samples)
            hint_BLD = None if hint_BLD is None else hint_BLD.repeat(num_samples, 1, 1)
        hidden_BLD = self.hidden(
            batch,
            corruption,
            hint=hint_BLD,
            latent=None if draw is None else draw.z_BSd,
            annealing=step.annealing,
            dropout=corruption.key.stream("dropout") if self.training else None,
        )
        part = self.denoiser.part if isinstance(self.denoiser, Transformer) else None
        if part is not None:
            corruption = corruption.share_of_rows(part.rank, part.size)
        hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, corruption.rows_M)
        log_share_BS = None
        if draw is not None and num_samples > 1:
            log_share_BS = self._log_shares(hidden_MD, corruption, draw, step.kl_weight)
            corruption = corruption.weighed(log_share_BS.exp())
        loss, ce_M = self.denoiser.cross_entropy(
            hidden_MD, corruption.rows_M, corruption.targets_M, corruption.weight_M, forbidden=self.config.mask_id
        )
        loss_B = ce_M.new_zeros(hidden_BLD.shape[0]).index_add_(0, corruption.sequence_M, ce_M * corruption.weight_M)
        if self.augmentation is not None and self.augmentation.config.mse_weight:
            loss = loss + self.augmentation.config.mse_weight * self._squared_error(hidden_MD, corruption)
        if draw is not None:
            counts = 1.0 if part is None or part.rank == 0 else 0.0
            priced_B = counts * draw.price(corruption.weight_BS, log_share_BS, step.kl_weight)
            loss, loss_B = loss + priced_B.sum(), loss_B + priced_B.detach()
        if log_share_BS is not None:
            ce_M = ce_M * corruption.of_rows(log_share_BS.exp())
            loss_B = loss_B.unflatten(0, (num_samples, -1)).sum(0)
        return LossTerms(loss, ce_M[: corruption.num_masked].sum(), loss_B, sums)

    def hidden(
        self,
        batch: Batch,
        corruption: Corruption,
        *,
        hint: Tensor | None = None,
        latent: Tensor | None = None,
        annealing: Annealing | None = None,
        dropout: Stream | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of the corrupted positions, with blocks from one pass over [x_t | x_0].

        Args:
            hint: what is added to the embeddings of x_t, [B, L, D]; see `draw_hint`.
            latent: z of each segment, [B, S, d].
            annealing: how far attention has opened; None: as far as the model's goes.
            dropout: the stream to draw dropout from.
        """
        length, segments = batch.tokens_BL.shape[1], corruption.num_segments
        x_BLD, t_BS = self.denoiser.embed(corruption.x_t_BL), corruption.t_BS
        if hint is not None:
            x_BLD = x_BLD + hint
        positions, latent_BSd = batch.positions_BL, latent
        spec = self.mask(document_BL=batch.document_BL, two_streams=segments > 1, annealing=annealing)
        if segments > 1:
            clean_BLD = self.denoiser.embed(batch.tokens_BL)
            if self.config.augmentation is not None and self.config.augmentation.fusion == "literal":
                clean_BLD = 2.0 * clean_BLD
            x_BLD = torch.cat((x_BLD, clean_BLD), dim=1)
            t_BS = torch.cat((t_BS, torch.zeros_like(t_BS)), dim=1)
            positions = positions.repeat(1, 2)
            latent_BSd = None if latent is None else latent.repeat(1, 2, 1)
        hidden = self._run(x_BLD, t_BS, latent_BSd, mask=spec, positions=positions, dropout=dropout)
        return hidden[:, :length]

    @torch.no_grad()
    def _log_shares(self, hidden_MD: Tensor, corruption: Corruption, draw: LatentDraw, kl_weight: float) -> Tensor:
        """Log of each sample's share [K * B, S] in the mean inside the K-sample DELBO (VADD Eq. 20).

        The gradient of -log mean exp(-loss) is the samples' gradients, weighed by these shares.
        """
        ones_M = (corruption.weight_M != 0).float()
        _, ce_M = self.denoiser.cross_entropy(
            hidden_MD, corruption.rows_M, corruption.targets_M, ones_M, forbidden=self.config.mask_id
        )
        nats_BS = corruption.by_segment(ce_M)
        if isinstance(self.denoiser, Transformer) and self.denoiser.part is not None:
            nats_BS = self.denoiser.part.total(nats_BS)
        cost_KBS = (nats_BS + kl_weight * draw.kl_BS).unflatten(0, (draw.num_samples, -1))
        return (-cost_KBS).log_softmax(0).flatten(0, 1)

    def draw_latent(self, batch: Batch, corruption: Corruption, num_samples: int = 1) -> LatentDraw:
        """z of every segment: from the recognition network where something is masked, else from the prior."""
        assert self.latent is not None
        posterior = self.infer(batch, corruption)
        stream, shape = corruption.key.stream("latent"), (corruption.num_segments, self.latent.dim)
        streams = [stream] if num_samples == 1 else [stream.fold(k) for k in range(num_samples)]
        noise_BSd = torch.cat([each.normal(*shape) for each in streams])
        hidden_BS, prior = corruption.hidden_BS.repeat(num_samples, 1), self.latent.prior
        own = posterior.repeated(num_samples)
        if isinstance(prior, EarlierBlocksPrior):
            z_BSd, kl_BS = draw_in_turn(prior, own, hidden_BS, noise_BSd, closed_form=num_samples == 1)
        else:
            ahead = self.prior_given(batch, corruption).repeated(num_samples)
            z_BSd = own.where(hidden_BS, ahead).sample(noise_BSd)
            kl_BS = torch.where(hidden_BS, divergence(own, ahead, z_BSd, closed_form=num_samples == 1), 0.0)
        return LatentDraw(z_BSd, kl_BS, posterior, num_samples)

    def infer(self, batch: Batch, corruption: Corruption) -> Gaussian:
        """The posterior r(z | x0, M) of every segment, [B, S, d]."""
        assert self.latent is not None
        gaussian: Gaussian = self.latent.recognition(
            batch.tokens_BL,
            corruption.masked_BL,
            batch.maskable_BL,
            t_BS=corruption.t_BS,
            num_segments=corruption.num_segments,
            document_BL=batch.document_BL,
            positions_BL=batch.positions_BL,
        )
        return gaussian

    def prior_given(self, batch: Batch, corruption: Corruption) -> Gaussian:
        """The prior of every segment, [B, S, d], N(0, I) or p(z | x_t); not for p(z^b | z^(<b))."""
        assert self.latent is not None
        num_rows, segments = corruption.t_BS.shape
        if self.latent.prior is None:
            return standard_normal(num_rows, segments, self.latent.dim, device=batch.tokens_BL.device)
        x_t_BL, positions_BL = corruption.x_t_BL, batch.positions_BL
        if segments > 1:
            x_t_BL = torch.cat((x_t_BL, batch.tokens_BL), dim=1)
            positions_BL = positions_BL.repeat(1, 2)
        spec = self.mask(document_BL=batch.document_BL, two_streams=segments > 1)
        gaussian: Gaussian = self.latent.prior(x_t_BL, spec, positions_BL, batch.maskable_BL, segments)
        return gaussian

    def draw_hint(self, corruption: Corruption) -> Tensor:
        """What is added to the embeddings of x_t, [B, L, D]: fused hints where masked (CADD Algorithm 1)."""
        assert self.augmentation is not None
        real = slice(0, corruption.num_masked)
        rows_M, targets_M = corruption.rows_M[real], corruption.targets_M[real]
        length = corruption.masked_BL.shape[1]
        t_M = corruption.t_BS[corruption.sequence_M[real], corruption.segment_of(rows_M)]
        z0_MD = self.augmentation.clean(self.denoiser.embed(targets_M))
        stream_M = corruption.key.stream("hint").at(corruption.sequence_M[real], rows_M % length)
        z_t_MD = self.augmentation.noisy(z0_MD, t_M, stream_M.normal(z0_MD.shape[1]))
        return self._place(z_t_MD, rows_M, t_M, corruption.x_t_BL)

    def denoise(
        self,
        x_t: Tensor,
        *,
        t: Tensor | None = None,
        mask: MaskSpec | None = None,
        hint: Tensor | None = None,
        latent: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of a partly masked sequence, for samplers.

        Args:
            x_t: token ids [B, L].
            t: times [B] or [B, S], for models that are told t and for hints.
            mask: what attention may see; default: what the model was trained with, on one stream.
            hint: noisy embeddings z_t [B, L, D], used where x_t is the mask.
            latent: z [B, S, d].
            cache: keys and values of earlier blocks.
            positions: default: counted on from the cache.

        Raises:
            ValueError: a latent or a hint is missing, or the model has no use for it.
        """
        for name, given, wanted in (("latent", latent, self.latent), ("hint", hint, self.augmentation)):
            if (given is None) != (wanted is None):
                has = "was trained with" if given is None else "was trained without"
                raise ValueError(f"this model {has} a {name}: {'pass' if given is None else 'drop'} {name}")
        t_BS = t if t is None or t.dim() == 2 else t[:, None]
        self._refuse_beyond_positions(x_t.shape[1] + (cache.length if cache is not None else 0))
        if self.config.autoregressive:
            x_t = shift_right(x_t, torch.arange(x_t.shape[1], device=x_t.device).expand_as(x_t), self.config.mask_id)
        x_BLD = self.denoiser.embed(x_t)
        if hint is not None:
            assert t_BS is not None, "hints need t"
            rows_M = (x_t == self.config.mask_id).flatten().nonzero()[:, 0]
            t_M = t_BS.repeat_interleave(x_t.shape[1] // t_BS.shape[1], 1).expand_as(x_t).flatten()[rows_M]
            x_BLD = x_BLD + self._place(hint.flatten(0, 1)[rows_M], rows_M, t_M, x_t)
        spec = mask or (MaskSpec() if cache is not None else self.mask())
        return self._run(x_BLD, t_BS, latent, mask=spec, cache=cache, positions=positions)

    def mask(
        self,
        *,
        document_BL: Tensor | None = None,
        two_streams: bool = False,
        annealing: Annealing | None = None,
    ) -> MaskSpec:
        """What the denoiser's attention may see."""
        causal = self.config.autoregressive or annealing is not None
        direction: Literal["causal", "bidirectional"] = "causal" if causal else "bidirectional"
        return MaskSpec(direction, document_BL, self.config.block_size, two_streams, annealing)

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """Logits [M, V] in float32, the mask's own at minus infinity."""
        logits_MV = self.denoiser.logits(hidden_MD, rows_M).float()
        logits_MV[:, self.config.mask_id] = -torch.inf
        return logits_MV

    def _run(
        self,
        x_BLD: Tensor,
        t_BS: Tensor | None,
        latent_BSd: Tensor | None,
        *,
        mask: MaskSpec,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        dropout: Stream | None = None,
    ) -> Tensor:
        condition = None
        if self.latent is not None and latent_BSd is not None:
            embedded_BSC = self.latent.embedding(latent_BSd.to(x_BLD.dtype))
            if self.config.latent is not None and self.config.latent.inject == "adaln":
                condition = embedded_BSC
            else:
                x_BLD = x_BLD + embedded_BSC.repeat_interleave(x_BLD.shape[1] // embedded_BSC.shape[1], dim=1)
        hidden: Tensor = self.denoiser(
            x_BLD, t=t_BS, mask=mask, condition=condition, cache=cache, positions=positions, dropout=dropout
        )
        return hidden

    def _refuse_beyond_positions(self, length: int) -> None:
        backbone = self.config.backbone
        if isinstance(backbone, TransformerConfig) and 0 < backbone.max_positions < length:
            raise ValueError(
                f"{length} positions are more than backbone.max_positions={backbone.max_positions}, which this model "
                "was trained with: use a shorter sequence"
            )

    def _place(self, z_t_MD: Tensor, rows_M: Tensor, t_M: Tensor, x_t_BL: Tensor) -> Tensor:
        """Fused hints at their rows [B, L, D], zero elsewhere (literal: w(x), so that the input there is 2 w(x))."""
        assert self.augmentation is not None
        assert isinstance(self.denoiser, Transformer)
        mask_D = self.denoiser.embed(x_t_BL.new_tensor(self.config.mask_id))
        loud = loudness(self.denoiser.table(), self.denoiser.vocabulary)
        added_MD = self.augmentation.fuse(z_t_MD, mask_D, loud, self.schedule.alpha(t_M))
        literal = self.augmentation.config.fusion == "literal"
        base_BLD = self.denoiser.embed(x_t_BL) if literal else mask_D.new_zeros(*x_t_BL.shape, mask_D.shape[0])
        return base_BLD.flatten(0, 1).index_copy(0, rows_M, added_MD.to(base_BLD.dtype)).view_as(base_BLD)

    def _squared_error(self, hidden_MD: Tensor, corruption: Corruption) -> Tensor:
        """Weighted sum of |z0_hat - z0|^2 over masked rows, a chunk of logits at a time."""
        assert self.augmentation is not None
        table_VD = self.denoiser.embed.weight
        total = hidden_MD.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_ELEMENTS // self.config.vocab_size)
        for chunk in torch.arange(corruption.num_masked, device=hidden_MD.device).split(rows):
            error_M = checkpoint(
                self._row_errors,
                hidden_MD[chunk],
                corruption.rows_M[chunk],
                corruption.targets_M[chunk],
                table_VD,
                use_reentrant=False,
            )
            total = total + (error_M * corruption.weight_M[chunk]).sum()
        return total

    def _row_errors(self, hidden_MD: Tensor, rows_M: Tensor, targets_M: Tensor, table_VD: Tensor) -> Tensor:
        assert self.augmentation is not None
        z0_MD = self.augmentation.clean(F.embedding(targets_M, table_VD))
        return self.augmentation.squared_error(self.logits(hidden_MD, rows_M), table_VD, z0_MD)
