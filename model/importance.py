"""Latents from the recognition network, weighed by how likely the prior holds them (VADD Eq. 20).

Shapes: B sequences, L positions, S segments, M masked rows, K samples of z, H hints, D width, d latent width.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .batch import Batch
from .corruption import Corruption
from .diffusion import MaskedDiffusion
from .latent import EarlierBlocksPrior, Gaussian

POSITIONS_AT_ONCE = 1 << 15
"""Most positions in one pass of the network, unless a batch alone has more."""


@dataclass(frozen=True)
class Weighed:
    """What the network makes of K samples of z for one corruption.

    Args:
        hidden_KHMD: hidden states of the masked rows, without padding.
        log_ratio_KBS: log p(z) - log r(z | x0, M) of each segment, float64; 0 where nothing is masked.
    """

    hidden_KHMD: Tensor
    log_ratio_KBS: Tensor


def weighed(
    model: MaskedDiffusion,
    batch: Batch,
    corruption: Corruption,
    num_latents: int,
    hint_HBLD: Tensor | None = None,
) -> Iterator[Weighed]:
    """Samples of z for the same corruption, as many at once as fit; without a latent there is one, of weight 1.

    With blocks a sample is one z for every block, so block b hears those that it drew for the blocks before.
    """
    if num_latents < 1:
        raise ValueError(f"num_latents={num_latents} must be at least 1")
    num_hints = 1 if hint_HBLD is None else hint_HBLD.shape[0]
    chunk = max(1, POSITIONS_AT_ONCE // (num_hints * batch.tokens_BL.numel()))
    if model.latent is None:
        none_KBS = torch.zeros(1, *corruption.t_BS.shape, dtype=torch.float64, device=corruption.t_BS.device)
        yield Weighed(_hidden(model, batch, corruption, None, hint_HBLD), none_KBS)
        return
    draws = _LatentDraws(model, batch, corruption)
    for first in range(0, num_latents, chunk):
        z_KBSd, log_ratio_KBS = draws.take(range(first, min(num_latents, first + chunk)))
        yield Weighed(_hidden(model, batch, corruption, z_KBSd, hint_HBLD), log_ratio_KBS)


def log_likelihoods(model: MaskedDiffusion, hidden_KMD: Tensor, corruption: Corruption) -> Tensor:
    """Log-probability of the true token at each masked row, [K, M] float64."""
    num_samples, real = hidden_KMD.shape[0], slice(0, corruption.num_masked)
    rows_N = corruption.rows_M[real].repeat(num_samples)
    _, ce_N = model.denoiser.cross_entropy(
        hidden_KMD.flatten(0, 1),
        rows_N,
        corruption.targets_M[real].repeat(num_samples),
        torch.ones_like(rows_N, dtype=hidden_KMD.dtype),
        forbidden=model.config.mask_id,
    )
    return -ce_N.double().unflatten(0, (num_samples, -1))


def log_mean_exp(chunks: Iterable[Tensor]) -> Tensor:
    """Log of the mean of exponentials over the first dimension of all chunks."""
    sums, count = [], 0
    for chunk in chunks:
        sums.append(chunk.logsumexp(0))
        count += chunk.shape[0]
    return reduce(torch.logaddexp, sums) - math.log(count)


class _LatentDraws:
    """Draws from r(z | x0, M), or from the prior in segments where nothing is masked."""

    def __init__(self, model: MaskedDiffusion, batch: Batch, corruption: Corruption) -> None:
        assert model.latent is not None
        self.prior, self.dim = model.latent.prior, model.latent.dim
        self.posterior = model.infer(batch, corruption)
        self.fixed = None if isinstance(self.prior, EarlierBlocksPrior) else model.prior_given(batch, corruption)
        self.hidden_BS, self.stream = corruption.hidden_BS, corruption.key.stream("latent")

    def take(self, numbers: range) -> tuple[Tensor, Tensor]:
        """The samples of these numbers [K, B, S, d], and their log p - log r [K, B, S]."""
        num_segments = self.hidden_BS.shape[1]
        noise_KBSd = torch.stack([self.stream.fold(k).normal(num_segments, self.dim) for k in numbers])
        z_KBSd = self.posterior.sample(noise_KBSd)
        for block in (~self.hidden_BS).any(0).nonzero()[:, 0].tolist():
            ahead_KBSd = self._prior_of(z_KBSd).sample(noise_KBSd)
            hidden_B1 = self.hidden_BS[:, block, None]
            z_KBSd[:, :, block] = torch.where(hidden_B1, z_KBSd[:, :, block], ahead_KBSd[:, :, block])
        log_ratio_KBS = _log_prob(self._prior_of(z_KBSd), z_KBSd) - _log_prob(self.posterior, z_KBSd)
        return z_KBSd, torch.where(self.hidden_BS, log_ratio_KBS, 0.0)

    def _prior_of(self, z_KBSd: Tensor) -> Gaussian:
        """The prior of every segment, which only z of earlier ones may have shaped."""
        if self.fixed is not None:
            return self.fixed
        assert isinstance(self.prior, EarlierBlocksPrior)
        ahead, shape = self.prior(z_KBSd.flatten(0, 1)[:, :-1]), z_KBSd.shape
        return Gaussian(ahead.mean.view(shape), ahead.log_std.view(shape))


def _log_prob(gaussian: Gaussian, z: Tensor) -> Tensor:
    return Gaussian(gaussian.mean.double(), gaussian.log_std.double()).log_prob(z.double())


def _hidden(
    model: MaskedDiffusion, batch: Batch, corruption: Corruption, z_KBSd: Tensor | None, hint_HBLD: Tensor | None
) -> Tensor:
    """Hidden states [K, H, M, D] of the masked rows, samples and hints run as further rows of the batch."""
    num_samples = 1 if z_KBSd is None else z_KBSd.shape[0]
    num_hints = 1 if hint_HBLD is None else hint_HBLD.shape[0]
    hidden = model.hidden(
        batch.repeated(num_samples * num_hints),
        corruption.repeated(num_samples * num_hints),
        hint=None if hint_HBLD is None else hint_HBLD.flatten(0, 1).repeat(num_samples, 1, 1),
        latent=None if z_KBSd is None else z_KBSd.repeat_interleave(num_hints, 0).flatten(0, 1),
    )
    rows_M = corruption.rows_M[: corruption.num_masked]
    return hidden.unflatten(0, (num_samples, num_hints, -1)).flatten(2, 3)[:, :, rows_M]
