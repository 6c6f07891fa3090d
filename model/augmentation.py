"""Continuous augmentation (CADD): a noisy embedding of each hidden token, and how it joins the mask's embedding.

Shapes: B sequences, L positions, D width, V vocabulary, M masked rows; "..." any.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .config import AugmentationConfig
from .losses import VocabularySlice


@dataclass(frozen=True)
class Path:
    """z_t = a(t) z0 + b(t) eps, from the embedding at t = 0 to pure noise at t = 1 (CADD Eq. 11 and B.1)."""

    kind: Literal["flow_matching", "vp"]

    def signal(self, t: Tensor) -> Tensor:
        """a(t), float64."""
        t = t.double()
        return 1.0 - t if self.kind == "flow_matching" else torch.cos(0.5 * math.pi * t)

    def noise(self, t: Tensor) -> Tensor:
        """b(t), float64."""
        t = t.double()
        return t.clone() if self.kind == "flow_matching" else torch.sin(0.5 * math.pi * t)

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of z_t and z0, and the variance, of the normal z_s given z_t and z0 (s < t; CADD Eq. 17).

        With a_ts = a_t / a_s and v = b_t^2 - a_ts^2 b_s^2, which is Eq. 17 on the variance-preserving path.
        """
        a_t, a_s, b_t, b_s = self.signal(t), self.signal(s), self.noise(t), self.noise(s)
        a_ts = a_t / a_s
        v = b_t**2 - a_ts**2 * b_s**2
        return a_ts * b_s**2 / b_t**2, a_s * v / b_t**2, v * b_s**2 / b_t**2


class Augmentation(nn.Module):
    """Hints: clean embeddings z0 = s w(x) / rms(w(x)), their noisy versions z_t, and their fusion with w(mask).

    One scale s for all tokens gives a hint the same meaning at any width and leaves no reason to grow norms. What a
    hint is multiplied by on its way into the network is one number too: a row's own norm would give it away.
    """

    def __init__(self, config: AugmentationConfig, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.path = config, Path(config.path)
        self.scale = signal_scale(config, dim, vocab_size)
        self.gate = nn.Parameter(torch.zeros(1)) if config.gated else None
        self.projection = nn.Linear(2 * dim, dim, bias=False) if config.fusion == "concat" else None

    def clean(self, rows_MD: Tensor) -> Tensor:
        """z0 of embedding rows [..., D]; gradients flow through."""
        if self.scale is None:
            return rows_MD
        return rows_MD * (self.scale * torch.rsqrt(rows_MD.square().mean(-1, keepdim=True) + 1e-12))

    def noisy(self, z0_MD: Tensor, t_M: Tensor, noise_MD: Tensor) -> Tensor:
        """z_t at times [M] (CADD Eq. 11)."""
        a, b = self.path.signal(t_M), self.path.noise(t_M)
        return a.to(z0_MD.dtype)[:, None] * z0_MD + b.to(z0_MD.dtype)[:, None] * noise_MD.to(z0_MD.dtype)

    def step(self, z_t: Tensor, z0: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """z_s drawn from the posterior given z_t and an estimate of z0 (CADD Algorithm 2); times broadcast."""
        of_z_t, of_z0, variance = (c.to(z_t.dtype) for c in self.path.posterior(t, s))
        return of_z_t * z_t + of_z0 * z0 + variance.sqrt() * noise.to(z_t.dtype)

    def fuse(self, z_t_MD: Tensor, mask_D: Tensor, loudness: Tensor, alpha_M: Tensor) -> Tensor:
        """What hints z_t add to the mask's embedding, [M, D], under the chosen fusion.

        Args:
            loudness: root mean square of all token embeddings, a scalar without gradient.
        """
        hint_MD = z_t_MD if self.scale is None else z_t_MD * loudness
        if self.config.fusion == "concat":
            assert self.projection is not None
            hint_MD = hint_MD.to(mask_D.dtype)  # a sampler keeps hints in float32, whatever the weights are
            added_MD = self.projection(torch.cat((mask_D.expand_as(hint_MD), hint_MD), dim=-1)) - mask_D
        elif self.config.fusion == "reweight":
            added_MD = alpha_M.to(hint_MD.dtype)[:, None] * (hint_MD - mask_D)
        else:
            added_MD = hint_MD
        return added_MD if self.gate is None else added_MD * self.gate

    def squared_error(self, logits_MV: Tensor, table_VD: Tensor, z0_MD: Tensor) -> Tensor:
        """|z0_hat - z0|^2 of each row [M], z0_hat soft (expected) or hard (of the best token) (CADD Eq. 21)."""
        return (self.estimate(logits_MV.log_softmax(-1), table_VD, self.config.z0) - z0_MD).square().sum(-1)

    def estimate(self, log_probs_MV: Tensor, table_VD: Tensor, z0: Literal["soft", "hard"]) -> Tensor:
        """z0_hat [M, D] (CADD Eq. 21)."""
        if z0 == "hard":
            return self.clean(F.embedding(log_probs_MV.argmax(-1), table_VD))
        return log_probs_MV.exp().to(table_VD.dtype) @ self.clean(table_VD)


def signal_scale(config: AugmentationConfig, dim: int, vocab_size: int) -> float | None:
    """RMS of z0 at which nearest-row decoding of z_t fails around `hint_half_life`; None: rows as they are.

    s = b(t*) / a(t*) sqrt(2 ln V / d): there, the distance between two rows is that at which the best of V noisy
    comparisons beats the true one.
    """
    if config.scale == "literal":
        return None
    path, half_life = Path(config.path), torch.tensor(config.hint_half_life, device="cpu")  # not the meta device
    ratio = float(path.noise(half_life) / path.signal(half_life))
    return ratio * math.sqrt(2.0 * math.log(vocab_size) / dim)


def loudness(table_VD: Tensor, part: VocabularySlice | None) -> Tensor:
    """Root mean square of the token embeddings, with no temporary as large as they are.

    Args:
        table_VD: the embeddings, or this rank's rows of them.
        part: which rows, when the vocabulary is split over ranks.
    """
    square = torch.linalg.vector_norm(table_VD.detach(), dim=1).square()
    if part is None:
        return square.mean().div(table_VD.shape[1]).sqrt()
    total = square.sum()
    dist.all_reduce(total, group=part.group)
    return total.div(part.total * table_VD.shape[1]).sqrt()
