"""The K-sample DELBO as a training loss: its value, its gradient and its limits (VADD Eq. 20).

Shapes: B sequences, L positions, S segments, K samples of z, M masked rows, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from model.batch import Batch
from model.bounds import delbo
from model.config import AugmentationConfig, LatentConfig, ModelConfig, PointMlpConfig, TransformerConfig
from model.corruption import Corruption, corrupt, corrupt_uniform_count
from model.diffusion import MaskedDiffusion, StepSchedule
from model.latent import EarlierBlocksPrior, Gaussian
from model.noise import NoiseKey

Build = Callable[..., MaskedDiffusion]
MakeBatch = Callable[..., Batch]

SYMBOLS, MASK, LENGTH, LATENT, SAMPLES, KL_WEIGHT = 12, 12, 8, 5, 3, 0.7
VADD = ModelConfig(
    backbone=TransformerConfig(dim=16, num_layers=1, num_heads=2, condition_dim=8),
    vocab_size=SYMBOLS + 1,
    mask_id=MASK,
    latent=LatentConfig(dim=LATENT, num_samples=SAMPLES),
)
assert VADD.latent is not None
CONFIGS = {
    "vadd": VADD,
    "block vmd": replace(VADD, block_size=4),
    "prior given x_t": replace(VADD, latent=replace(VADD.latent, prior="x_t")),
    "prior given blocks": replace(VADD, block_size=2, latent=replace(VADD.latent, prior="earlier_blocks")),
    "with hints": replace(VADD, augmentation=AugmentationConfig()),
    "points": replace(
        VADD,
        backbone=PointMlpConfig(dim=16, num_layers=2, num_dimensions=LENGTH),
        time_conditioning=True,
        latent=LatentConfig(dim=2, inject="embedding", num_samples=SAMPLES),
    ),
}


def with_samples(number: int) -> ModelConfig:
    assert VADD.latent is not None
    return replace(VADD, latent=replace(VADD.latent, num_samples=number))


def prepared(name: str, build: Build, make_batch: MakeBatch) -> tuple[MaskedDiffusion, Batch, Corruption]:
    model = build(CONFIGS[name])
    batch = make_batch(5, LENGTH, SYMBOLS, maskable=0.7)
    return model, batch, corrupt(batch, NoiseKey(0, 3, batch.index_B), CONFIGS[name])


def by_definition(model: MaskedDiffusion, batch: Batch, corruption: Corruption) -> Tensor:
    """The loss of each sequence [B], every sample in a pass of its own, through plain logits."""
    draw, (num_sequences, num_segments) = model.draw_latent(batch, corruption, SAMPLES), corruption.t_BS.shape
    posterior, real = model.infer(batch, corruption), slice(0, corruption.num_masked)
    hint_BLD = None if model.augmentation is None else model.draw_hint(corruption)
    rows_M, targets_M = corruption.rows_M[real], corruption.targets_M[real]
    segments = torch.arange(num_segments).repeat_interleave(LENGTH // num_segments).repeat(num_sequences)[rows_M]
    log_weights = []
    for z_BSd in draw.z_BSd.chunk(SAMPLES):
        hidden_BLD = model.hidden(batch, corruption, latent=z_BSd, hint=hint_BLD)
        logits_MV = model.logits(hidden_BLD.flatten(0, 1)[rows_M], rows_M).double()
        log_p_M = logits_MV.log_softmax(1)[torch.arange(len(rows_M)), targets_M]
        log_p_BS = torch.stack(
            [
                torch.stack([log_p_M[(rows_M // LENGTH == b) & (segments == s)].sum() for s in range(num_segments)])
                for b in range(num_sequences)
            ]
        )
        cost_BS = log_density(posterior, z_BSd) - log_density(prior_of(model, batch, corruption, z_BSd), z_BSd)
        log_weights.append(log_p_BS - KL_WEIGHT * cost_BS * corruption.hidden_BS)
    nats_BS = math.log(SAMPLES) - torch.stack(log_weights).logsumexp(0)
    return (corruption.weight_BS * nats_BS).sum(1)


def prior_of(model: MaskedDiffusion, batch: Batch, corruption: Corruption, z_BSd: Tensor) -> Gaussian:
    assert model.latent is not None
    if isinstance(model.latent.prior, EarlierBlocksPrior):
        return model.latent.prior(z_BSd[:, :-1])
    return model.prior_given(batch, corruption)


def log_density(gaussian: Gaussian, z_BSd: Tensor) -> Tensor:
    return Normal(gaussian.mean.double(), gaussian.log_std.double().exp()).log_prob(z_BSd).sum(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_minus_log_mean_exp(name: str, build: Build, make_batch: MakeBatch) -> None:
    model, batch, corruption = prepared(name, build, make_batch)
    terms = model(batch, corruption, step=StepSchedule(kl_weight=KL_WEIGHT))
    expected_B = by_definition(model, batch, corruption)
    assert torch.allclose(terms.loss_B.double(), expected_B, rtol=1e-5)
    assert terms.loss.item() == pytest.approx(expected_B.sum().item(), rel=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(terms.loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected_B.sum(), parameters, allow_unused=True)
    assert sum(gradient is not None for gradient in wanted) > len(wanted) // 2
    for one, two in zip(found, wanted, strict=True):
        one, two = (torch.zeros(()) if gradient is None else gradient for gradient in (one, two))
        assert (one - two).norm() <= 1e-5 * two.norm() + 1e-7


@torch.no_grad()
def test_more_samples_are_tighter_and_the_loss_is_the_bound_of_evaluation(build: Build, make_batch: MakeBatch) -> None:
    batch, found = make_batch(200, LENGTH, SYMBOLS), {}
    for number in (1, 2, 8):
        model, losses = build(with_samples(number)).eval(), []
        for step in range(5):
            key = NoiseKey(0, step, batch.index_B)
            loss_B = model(batch, corrupt_uniform_count(batch, key, model.config), step=StepSchedule()).loss_B
            losses.append(loss_B)
            if number > 1:
                assert torch.allclose(loss_B, delbo(model, batch, key, num_latents=number), rtol=1e-5)
        found[number] = torch.cat(losses).mean()
    assert found[8] < found[2] < found[1]


@torch.no_grad()
def test_a_latent_that_nothing_hears_leaves_the_loss_of_one_sample(build: Build, make_batch: MakeBatch) -> None:
    """Posterior and prior equal, the denoiser deaf: every sample weighs the same and costs nothing."""
    model, batch, corruption = prepared("vadd", build, make_batch)
    assert model.latent is not None
    for parameter in (*model.latent.embedding.parameters(), *model.latent.recognition.head.parameters()):  # type: ignore[union-attr]
        parameter.zero_()
    alone = build(with_samples(1))
    alone.load_state_dict(model.state_dict())
    several, one = (each(batch, corruption, step=StepSchedule()) for each in (model, alone))
    assert torch.allclose(several.loss_B, one.loss_B, rtol=1e-6)
    assert several.cross_entropy.item() == pytest.approx(one.cross_entropy.item(), rel=1e-6)
