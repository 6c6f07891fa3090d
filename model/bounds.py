"""What a model says about -log p, in positive nats: one Monte Carlo estimate per sequence, and sums with their error.

Only `nelbo`, `nelbo_kept` and `step_bound.nelbo_steps` are bounds, each of the sampler it names; `delbo` and
`nll_discrete` are what the papers print (docs/errata.md). A sampler here takes every token at temperature 1, in
random order.

Shapes: B sequences, S segments, M masked rows, K samples of z.
"""

import math
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from .batch import Batch
from .corruption import corrupt_uniform_count
from .diffusion import MaskedDiffusion, StepSchedule
from .importance import log_likelihoods, log_mean_exp, weighed
from .noise import NoiseKey


@dataclass(frozen=True)
class Bound:
    """An estimate in nats per token, its standard error, and the number of tokens it was measured on.

    kind: what it estimates; only `nelbo` and its relatives bound -log p (docs/errata.md).
    """

    value: float
    error: float
    tokens: int
    kind: str = "nelbo"


@dataclass
class BoundSums:
    """Sums over sequences from which a ratio of totals and its error follow; they add up over ranks."""

    loss: float = 0.0
    loss_squared: float = 0.0
    loss_tokens: float = 0.0
    tokens: float = 0.0
    tokens_squared: float = 0.0

    def add(self, loss_B: Tensor, tokens_B: Tensor) -> None:
        """Adds sequences: their loss with the weights of `corrupt_uniform_count`, and their maskable tokens."""
        loss, tokens = loss_B.double().cpu(), tokens_B.double().cpu()
        self.loss += float(loss.sum())
        self.loss_squared += float(loss.square().sum())
        self.loss_tokens += float((loss * tokens).sum())
        self.tokens += float(tokens.sum())
        self.tokens_squared += float(tokens.square().sum())

    def as_list(self) -> list[float]:
        """For an all-reduce."""
        return list(astuple(self))

    def estimate(self, kind: str = "nelbo") -> Bound:
        """Nats per token; the error is that of a ratio of sums, sequences being independent draws."""
        if self.tokens == 0:
            return Bound(math.nan, math.nan, 0, kind)
        ratio = self.loss / self.tokens
        variance = self.loss_squared - 2 * ratio * self.loss_tokens + ratio**2 * self.tokens_squared
        return Bound(ratio, math.sqrt(max(0.0, variance)) / self.tokens, int(self.tokens), kind)


@torch.no_grad()
def nelbo(model: MaskedDiffusion, batch: Batch, key: NoiseKey, *, num_latents: int = 1) -> Tensor:
    """Bound [B], float64, of the sampler that reveals one token at a time, each with a fresh z.

    w(t) x the sum over masked i of -log mean_k mu^i(x_t, z_k) p(z_k) / r(z_k | x0, M).

    Raises:
        ValueError: the model has another sampler.
    """
    refuse_bound(model, "nelbo", batch.tokens_BL.shape[1])
    corruption = corrupt_uniform_count(batch, key, model.config)
    real = slice(0, corruption.num_masked)
    sequence_M, segment_M = corruption.sequence_M[real], corruption.segment_of(corruption.rows_M[real])
    nats_M = -log_mean_exp(
        log_likelihoods(model, some.hidden_KHMD[:, 0], corruption) + some.log_ratio_KBS[:, sequence_M, segment_M]
        for some in weighed(model, batch, corruption, num_latents)
    )
    return nats_M.new_zeros(batch.num_sequences).index_add(0, sequence_M, nats_M * corruption.weight_M[real])


@torch.no_grad()
def nelbo_kept(model: MaskedDiffusion, batch: Batch, key: NoiseKey) -> Tensor:
    """Bound [B], float64, of the sampler that reveals one token at a time and keeps the z of a sequence, or of a block.

    w(t) x the cross-entropy given z from r(z | x0, everything masked), whose KL counts once (VMD Eq. 6).

    Raises:
        ValueError: the model has another sampler.
    """
    refuse_bound(model, "nelbo_kept", batch.tokens_BL.shape[1])
    corruption = corrupt_uniform_count(batch, key, model.config)
    blank = replace(
        corruption,
        x_t_BL=batch.tokens_BL.masked_fill(batch.maskable_BL, model.config.mask_id),
        masked_BL=batch.maskable_BL,
        t_BS=torch.ones_like(corruption.t_BS),
    )
    draw = model.draw_latent(batch, blank)
    real = slice(0, corruption.num_masked)
    hidden_MD = model.hidden(batch, corruption, latent=draw.z_BSd).flatten(0, 1)[corruption.rows_M[real]]
    nats_M = -log_likelihoods(model, hidden_MD[None], corruption)[0] * corruption.weight_M[real]
    return corruption.by_segment(nats_M).sum(1) + draw.kl_BS.double().sum(1)


@torch.no_grad()
def delbo(model: MaskedDiffusion, batch: Batch, key: NoiseKey, *, num_latents: int = 1) -> Tensor:
    """The K-sample DELBO [B], float64 (VADD Eq. 9 and 20); with one sample the training loss, in expectation.

    w(t) x -log mean_k p(x0 | x_t, z_k) p(z_k) / r(z_k | x0, M). Not a bound once z ties tokens.

    Raises:
        ValueError: the model has no DELBO.
    """
    refuse_bound(model, "delbo", batch.tokens_BL.shape[1])
    corruption = corrupt_uniform_count(batch, key, model.config)
    nats_BS = -log_mean_exp(
        corruption.by_segment(log_likelihoods(model, some.hidden_KHMD[:, 0], corruption)) + some.log_ratio_KBS
        for some in weighed(model, batch, corruption, num_latents)
    )
    return (corruption.weight_BS * nats_BS).sum(1)


@torch.no_grad()
def nll_discrete(model: MaskedDiffusion, batch: Batch, key: NoiseKey) -> Tensor:
    """What CADD's Tables 5-7 hold [B], float64: w(t) x the cross-entropy given hints made from x0. Not a bound.

    Raises:
        ValueError: the model has no hints.
    """
    refuse_bound(model, "nll_discrete", batch.tokens_BL.shape[1])
    assert not model.training, "dropout is off in evaluation"
    return model(batch, corrupt_uniform_count(batch, key, model.config), step=StepSchedule()).loss_B.double()


def refuse_bound(model: MaskedDiffusion, name: str, length: int) -> None:
    """Raises ValueError for a bound of a sampler that a model has not."""
    blocks = model.config.num_segments(length) > 1
    if model.augmentation is not None and name not in ("nelbo_steps", "nll_discrete"):
        raise ValueError(
            f"{name} of a model with augmentation would read hints made from the hidden tokens: use nelbo_steps, which "
            "pays for them, or nll_discrete, which the paper prints"
        )
    if model.augmentation is None and name == "nll_discrete":
        raise ValueError(f"nll_discrete needs a model with augmentation: use {model.config.objective}")
    if model.latent is None and name == "nelbo_kept":
        raise ValueError("nelbo_kept needs a model with a latent, of which this one has none to keep: use nelbo")
    if model.latent is not None and blocks and name in ("nelbo", "nelbo_steps"):
        raise ValueError(
            f"{name} is for a z that is drawn anew at every step, but later blocks hear the z of a finished one: "
            "use nelbo_kept"
        )
    if model.config.autoregressive and name == "nelbo_steps":
        raise ValueError("an autoregressive model writes one token a step, not nelbo_steps: use nelbo, which is exact")
