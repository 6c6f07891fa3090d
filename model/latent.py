"""Latents that tie tokens together: the recognition network, pooling, priors, and how z reaches the denoiser.

Shapes: B sequences, L positions, S segments with a latent each, D width, d latent width.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig, PointMlpConfig, recognition_backbone
from .masks import MaskSpec
from .point_mlp import SiameseMlp
from .sequence import SequencePart
from .transformer import Transformer


@dataclass(frozen=True)
class Gaussian:
    """Diagonal normal distributions, [..., d]."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std x noise, differentiable."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density [...]."""
        scaled = (z - self.mean) * (-self.log_std).exp()
        return (-0.5 * scaled.square() - self.log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self, other) of each dimension [..., d], nats."""
        ratio = (2.0 * (self.log_std - other.log_std)).exp()
        distance = (self.mean - other.mean).square() * (-2.0 * other.log_std).exp()
        return 0.5 * (ratio + distance - 1.0) + other.log_std - self.log_std

    def repeated(self, times: int) -> "Gaussian":
        """The same that many times over along the first dimension."""
        rest = (1,) * (self.mean.dim() - 1)
        return Gaussian(self.mean.repeat(times, *rest), self.log_std.repeat(times, *rest))

    def where(self, condition: Tensor, other: "Gaussian") -> "Gaussian":
        """Self where the condition [...] holds, other elsewhere."""
        wide = condition[..., None]
        return Gaussian(torch.where(wide, self.mean, other.mean), torch.where(wide, self.log_std, other.log_std))


def standard_normal(*shape: int, device: torch.device) -> Gaussian:
    """N(0, I) of shape [*shape]."""
    zeros = torch.zeros(*shape, device=device)
    return Gaussian(zeros, zeros)


class GaussianHead(nn.Module):
    """Mean and log-deviation from a vector; the deviation starts at 1."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(dim, latent_dim)
        self.log_std = nn.Linear(dim, latent_dim)

    def forward(self, pooled: Tensor) -> Gaussian:
        return Gaussian(self.mean(pooled).float(), self.log_std(pooled).float().clamp(-10.0, 5.0))


class Pool(nn.Module):
    """The positions of each segment become one vector: their mean, or a softmax over learned scores (VMD C.2)."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False) if kind == "gated" else None

    def forward(
        self, hidden_BLD: Tensor, keep_BL: Tensor, num_segments: int, part: SequencePart | None = None
    ) -> Tensor:
        """[B, S, D] from the positions kept; zeros where a segment keeps none.

        Args:
            hidden_BLD: of these and, behind them, of a second stream, which is not pooled; or the part of it all that
                this process has.
            part: which part; what the processes pool is added up.
        """
        length = keep_BL.shape[1]
        keep_BSR = keep_BL.unflatten(1, (num_segments, -1))
        if self.score is None:
            weight_BSR = keep_BSR / keep_BSR.sum(2, keepdim=True).clamp(min=1)
        else:
            score_BL = self.score(hidden_BLD)[..., 0].float()
            score_BL = score_BL if part is None else part.gather(score_BL)
            score_BSR = score_BL[:, :length].unflatten(1, (num_segments, -1))
            lowest = torch.finfo(score_BSR.dtype).min
            weight_BSR = score_BSR.masked_fill(~keep_BSR, lowest).softmax(2) * keep_BSR
        weight_BSR = weight_BSR.to(hidden_BLD.dtype)
        if part is not None:
            return part.pool(weight_BSR, hidden_BLD)
        return torch.einsum("bsr,bsrd->bsd", weight_BSR, hidden_BLD[:, :length].unflatten(1, (num_segments, -1)))


class Recognition(nn.Module):
    """r(z | x0, M): reads the clean sequence and is told which positions are masked (VADD Section 3.3).

    Without M it collapses onto the prior. With blocks it runs over two streams, marked and clean, so that z^b depends
    on M in its own block only and on x0 up to its own block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.latent is not None
        self.settings, self.block_size = config.latent.recognition, config.block_size
        trunk = recognition_backbone(config)
        self.trunk = Transformer(trunk, config.vocab_size)
        self.mark = nn.Embedding(1, trunk.condition_dim or trunk.dim)
        self.pool = Pool(trunk.dim, self.settings.pool)
        self.head = GaussianHead(trunk.dim, config.latent.dim)

    def forward(
        self,
        tokens_BL: Tensor,
        masked_BL: Tensor,
        maskable_BL: Tensor,
        *,
        t_BS: Tensor,
        num_segments: int,
        document_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
    ) -> Gaussian:
        """The posterior of each segment's z, [B, S, d]; transformers do not look at t."""
        marked, positions = self.trunk.embed(tokens_BL), positions_BL
        spec, applies = MaskSpec(document_BL=document_BL), masked_BL
        if self.settings.marks == "added":
            marked = torch.where(masked_BL[:, :, None], marked + self.mark.weight, marked)
        if num_segments > 1:
            marked = torch.cat((marked, self.trunk.embed(tokens_BL)), dim=1)
            applies = F.pad(masked_BL, (0, masked_BL.shape[1]))
            spec = replace(spec, block_size=self.block_size, two_streams=True)
            positions = two_streams(positions_BL, masked_BL.shape[1], masked_BL.device)
        condition = self.mark.weight if self.settings.marks == "adaln" else None
        hidden_BLD = self.trunk(
            marked,
            mask=spec,
            condition=condition,
            applies=applies if condition is not None else None,
            positions=positions,
            gather=False,
        )
        keep_BL = masked_BL if self.settings.pool_over == "masked" else maskable_BL
        pooled_BSD = self.pool(hidden_BLD, keep_BL, num_segments, self.trunk.part)
        gaussian: Gaussian = self.head(pooled_BSD)
        return gaussian


class SiameseRecognition(nn.Module):
    """r(z | x0, xt, t) of the 2D toys: one perceptron reads both, their outputs are averaged (VADD B.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.latent is not None
        assert isinstance(config.backbone, PointMlpConfig)
        self.mask_id = config.mask_id
        recognition = config.latent.recognition
        self.mlp = SiameseMlp(
            replace(
                config.backbone,
                dim=recognition.dim or config.backbone.dim,
                num_layers=recognition.num_layers or config.backbone.num_layers,
            ),
            config.vocab_size,
        )
        self.head = GaussianHead(self.mlp.dim, config.latent.dim)

    def forward(
        self,
        tokens_BL: Tensor,
        masked_BL: Tensor,
        maskable_BL: Tensor,
        *,
        t_BS: Tensor,
        num_segments: int,
        document_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
    ) -> Gaussian:
        """The posterior of z, [B, 1, d]; a point has no documents, positions or blocks."""
        hidden_BD = self.mlp(tokens_BL, tokens_BL.masked_fill(masked_BL, self.mask_id), t_BS[:, 0])
        gaussian: Gaussian = self.head(hidden_BD[:, None])
        return gaussian


class PartlyMaskedPrior(nn.Module):
    """p(z | x_t), with blocks p(z^b | x_t^b, x_0^(<b)) (VMD E.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.latent is not None
        trunk = replace(recognition_backbone(config), num_layers=config.latent.prior_layers, condition_dim=0)
        self.trunk = Transformer(trunk, config.vocab_size)
        self.pool = Pool(trunk.dim, config.latent.recognition.pool)
        self.head = GaussianHead(trunk.dim, config.latent.dim)

    def forward(
        self, x_t: Tensor, mask: MaskSpec, positions: Tensor | None, keep_BL: Tensor, num_segments: int
    ) -> Gaussian:
        """[B, S, d] of the segments of the first stream; `keep_BL` are the positions to pool."""
        hidden_BLD = self.trunk(x_t, mask=mask, positions=positions, gather=False)
        gaussian: Gaussian = self.head(self.pool(hidden_BLD, keep_BL, num_segments, self.trunk.part))
        return gaussian


class EarlierBlocksPrior(nn.Module):
    """p(z^b | z^(<b)): a causal transformer over latents behind a start vector (VMD E.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.latent is not None
        trunk = recognition_backbone(config)
        trunk = replace(trunk, num_layers=config.latent.prior_layers, condition_dim=0, max_positions=0)
        self.trunk = Transformer(trunk, vocab_size=1)
        self.project = nn.Linear(config.latent.dim, trunk.dim)
        self.head = GaussianHead(trunk.dim, config.latent.dim)

    def forward(self, z_BSd: Tensor) -> Gaussian:
        """The priors of the S + 1 latents that begin with the first, [B, S + 1, d]."""
        start = torch.zeros(z_BSd.shape[0], 1, dtype=torch.int64, device=z_BSd.device)
        inputs = torch.cat((self.trunk.embed(start), self.project(z_BSd.to(self.project.weight.dtype))), dim=1)
        gaussian: Gaussian = self.head(self.trunk(inputs, mask=MaskSpec(direction="causal")))
        return gaussian


class LatentEmbedding(nn.Module):
    """z as a condition of the denoiser, or as what is added to its embeddings."""

    def __init__(self, latent_dim: int, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(latent_dim, dim)
        self.outer = nn.Linear(dim, dim)

    def forward(self, z_BSd: Tensor) -> Tensor:
        out: Tensor = self.outer(F.silu(self.inner(z_BSd)))
        return out


class Latent(nn.Module):
    """All that a latent adds to a denoiser."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.latent is not None
        self.dim, backbone = config.latent.dim, config.backbone
        point = isinstance(backbone, PointMlpConfig)
        self.recognition = SiameseRecognition(config) if point else Recognition(config)
        learned = {"x_t": PartlyMaskedPrior, "earlier_blocks": EarlierBlocksPrior}
        self.prior = learned[config.latent.prior](config) if config.latent.prior in learned else None
        width = backbone.condition_dim if config.latent.inject == "adaln" else backbone.dim
        self.embedding = LatentEmbedding(self.dim, width)


def two_streams(positions_BL: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Positions of a sequence that is there twice, [B or 1, 2L]."""
    if positions_BL is None:
        positions_BL = torch.arange(length, device=device)[None]
    return positions_BL.repeat(1, 2)
