"""The bound of the ancestral sampler in T steps, with a fresh z at each and with hints (VADD Eq. 6, CADD Eq. 18-19).

Shapes: B sequences, L positions, S segments, M masked rows, K samples of z, H hints, D width, R rows of a chunk,
V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .bounds import refuse_bound
from .corruption import Corruption, MaskSchedule, build_corruption
from .diffusion import CHUNK_ELEMENTS, MaskedDiffusion
from .importance import log_likelihoods, log_mean_exp, weighed
from .noise import NoiseKey, stream_key

Estimate = Literal["soft", "hard"]


@torch.no_grad()
def nelbo_steps(
    model: MaskedDiffusion,
    batch: Batch,
    key: NoiseKey,
    *,
    num_steps: int,
    num_latents: int = 1,
    num_hints: int = 1,
    z0: Estimate = "hard",
) -> Tensor:
    """Bound [B], float64, of the sampler in T ancestral steps (a block), with a fresh z at each.

    T x -log mean_k p(z_k) / r(z_k | x0, M) x the product of mu^i(x_t, z_k) over what x_s ~ q(x_s | x_t, x0) reveals, at
    a random step from t to s; without a latent, x_s is averaged out. The hint of what stays hidden costs its KL (CADD
    Eq. 18-19), or with a latent the log-ratio of a draw. Loose at many steps with few samples.

    Args:
        num_steps: T.
        num_latents: K.
        num_hints: H, over which the sampler averages its predictions; each costs its own KL.
        z0: how the sampler estimates z0 (CADD Eq. 21).

    Raises:
        ValueError: the model has another sampler.
    """
    refuse_bound(model, "nelbo_steps", batch.tokens_BL.shape[1])
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if num_hints > 1 and model.augmentation is None:
        raise ValueError(f"num_hints={num_hints} needs a model with augmentation: use 1")
    move = _draw_move(model, batch, key, num_steps)
    corruption = move.corruption
    hints = None if model.augmentation is None else torch.stack([_hint(model, corruption, h) for h in range(num_hints)])
    nats_BS = -log_mean_exp(
        corruption.by_segment(_log_likelihoods(model, move, some.hidden_KHMD, z0)) + some.log_ratio_KBS
        for some in weighed(model, batch, corruption, num_latents, hints)
    )
    if hints is None:
        nats_BS = torch.where(corruption.by_segment(move.reveal_M) > 0, nats_BS, 0.0)
    return num_steps * nats_BS.sum(1)


@dataclass(frozen=True)
class _Move:
    """A step of the sampler from x_t, as it concerns each masked row.

    Args:
        corruption: x_t.
        t_M: the time before.
        s_M: the time after.
        reveal_M: 1 where the token is revealed, 0 where it stays hidden; without a latent the probability.
    """

    corruption: Corruption
    t_M: Tensor
    s_M: Tensor
    reveal_M: Tensor


def _draw_move(model: MaskedDiffusion, batch: Batch, key: NoiseKey, num_steps: int) -> _Move:
    """A random step for each segment, of a sampler that starts with everything hidden."""
    schedule, length = MaskSchedule(model.config.schedule), batch.tokens_BL.shape[1]
    done_BS = (key.stratified("grid", model.config.num_segments(length)) * num_steps).floor()
    t_BS, s_BS = 1.0 - done_BS / num_steps, 1.0 - (done_BS + 1.0) / num_steps
    at_first, at_t, at_s = (1.0 - schedule.alpha(time) for time in (torch.ones_like(t_BS), t_BS, s_BS))
    hide_BL = (at_t / at_first).repeat_interleave(length // t_BS.shape[1], 1)
    masked_BL = key.stream("mask").below(hide_BL) & batch.maskable_BL
    corruption = build_corruption(batch, key, model.config.mask_id, masked_BL, t_BS, torch.ones_like(t_BS), "maskable")
    rows_M, sequence_M = (rows[: corruption.num_masked] for rows in (corruption.rows_M, corruption.sequence_M))
    place = sequence_M, corruption.segment_of(rows_M)
    reveal_M = torch.where(s_BS > 0.0, 1.0 - at_s / at_t, 1.0)[place]
    if model.latent is not None:
        reveal_M = key.stream("reveal").at(sequence_M, rows_M % length).below(reveal_M).double()
    return _Move(corruption, t_BS[place], s_BS[place], reveal_M)


def _hint(model: MaskedDiffusion, corruption: Corruption, number: int) -> Tensor:
    """One of several independent hints, fused [B, L, D]."""
    key = replace(corruption.key, seed=stream_key(corruption.key.seed, f"hint {number}"))
    return model.draw_hint(replace(corruption, key=key))


def _log_likelihoods(model: MaskedDiffusion, move: _Move, hidden_KHMD: Tensor, z0: Estimate) -> Tensor:
    """Log-probability of what the step does to each row [K, M]; for a hint that stays, relative to q."""
    corruption = move.corruption
    if model.augmentation is None:
        return move.reveal_M * log_likelihoods(model, hidden_KHMD[:, 0], corruption)
    log_mu_KM, error_KMD = _predict(model, corruption, hidden_KHMD, z0)
    _, of_z0_M, variance_M = model.augmentation.path.posterior(move.t_M, move.s_M)
    shift_KMD = error_KMD * torch.where(move.s_M > 0.0, of_z0_M / variance_M.sqrt(), 0.0)[:, None]
    num_hints, dim = hidden_KHMD.shape[1], hidden_KHMD.shape[3]
    log_ratio_KM = -0.5 * num_hints * shift_KMD.square().sum(-1)
    if model.latent is not None:
        rows_M, sequence_M = (rows[: corruption.num_masked] for rows in (corruption.rows_M, corruption.sequence_M))
        stream_M = corruption.key.stream("stay").at(sequence_M, rows_M % corruption.masked_BL.shape[1])
        log_ratio_KM = log_ratio_KM - math.sqrt(num_hints) * (shift_KMD * stream_M.normal(dim)).sum(-1)
    return move.reveal_M * log_mu_KM + (1.0 - move.reveal_M) * log_ratio_KM


def _predict(
    model: MaskedDiffusion, corruption: Corruption, hidden_KHMD: Tensor, z0: Estimate
) -> tuple[Tensor, Tensor]:
    """Log of the mean prediction over hints for each true token [K, M], and z0 minus its estimate [K, M, D]."""
    assert model.augmentation is not None
    num_samples, num_hints = hidden_KHMD.shape[:2]
    table_VD = model.denoiser.embed.weight
    chunk = max(1, CHUNK_ELEMENTS // (model.config.vocab_size * num_samples * num_hints))
    log_mu, errors = [], []
    for place_R in torch.arange(corruption.num_masked, device=hidden_KHMD.device).split(chunk):
        rows_R, targets_R = corruption.rows_M[place_R], corruption.targets_M[place_R]
        logits = model.logits(hidden_KHMD[:, :, place_R].flatten(0, 2), rows_R.repeat(num_samples * num_hints))
        log_probs_KHRV = logits.log_softmax(1).unflatten(0, (num_samples, num_hints, -1))
        log_pi_KRV = log_probs_KHRV.logsumexp(1) - math.log(num_hints)
        estimate_KRD = model.augmentation.estimate(log_pi_KRV, table_VD, z0)
        log_mu.append(log_pi_KRV.gather(2, targets_R.expand(num_samples, -1)[:, :, None])[:, :, 0].double())
        errors.append(model.augmentation.clean(F.embedding(targets_R, table_VD)) - estimate_KRD)
    return torch.cat(log_mu, dim=1), torch.cat(errors, dim=1)
