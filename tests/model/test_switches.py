"""The three switches together: every combination trains, batches split, and nothing is forgotten or too much.

Shapes: B sequences, L positions, S blocks, D width, d latent width.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.batch import Batch
from model.collapse import posterior_sums
from model.config import (
    AugmentationConfig,
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    TransformerConfig,
)
from model.corruption import Corruption, corrupt, corrupt_uniform_count
from model.diffusion import LossTerms, MaskedDiffusion, StepSchedule
from model.initialisation import initialise
from model.latent import Gaussian
from model.noise import NoiseKey
from model.recompute import Recompute
from model.transformer import Transformer

Build = Callable[..., MaskedDiffusion]
MakeBatch = Callable[..., Batch]

SYMBOLS, MASK, LENGTH, DIM, LATENT = 12, 12, 8, 16, 5
BACKBONE = TransformerConfig(dim=DIM, num_layers=1, num_heads=2)
PLAIN = ModelConfig(backbone=BACKBONE, vocab_size=SYMBOLS + 1, mask_id=MASK)
FUSIONS = (None, "add", "concat", "reweight", "literal")


def switched(
    block_size: int = 0, latent: LatentConfig | None = None, augmentation: AugmentationConfig | None = None
) -> ModelConfig:
    adaln = latent is not None and latent.inject == "adaln"
    backbone = replace(BACKBONE, condition_dim=8 if adaln else 0)
    return replace(PLAIN, backbone=backbone, block_size=block_size, latent=latent, augmentation=augmentation)


def combinations() -> Iterator[ModelConfig]:
    latents = [None]
    for prior, inject, marks, pool in itertools.product(
        ("normal", "x_t", "earlier_blocks"), ("adaln", "embedding"), ("adaln", "added"), ("mean", "gated")
    ):
        recognition = RecognitionConfig(marks=marks, pool=pool)  # type: ignore[arg-type]
        latents.append(LatentConfig(dim=LATENT, prior=prior, inject=inject, recognition=recognition))  # type: ignore[arg-type]
    for block_size, latent, fusion in itertools.product((0, 2, LENGTH), latents, FUSIONS):
        if latent is not None and latent.prior == "earlier_blocks" and not block_size:
            continue
        hints = AugmentationConfig(fusion=fusion, mse_weight=0.1) if fusion else None  # type: ignore[arg-type]
        yield switched(block_size, latent, hints)


def corrupted(batch: Batch, config: ModelConfig, step: int = 0) -> Corruption:
    return corrupt(batch, NoiseKey(0, step, batch.index_B), config)


def may_be_still(config: ModelConfig, name: str) -> bool:
    """Parameters that can have no effect: the first latent has no predecessors."""
    earlier = config.latent is not None and config.latent.prior == "earlier_blocks"
    alone = ("prior.project.", "prior.trunk.blocks.0.attention.q.", "prior.trunk.blocks.0.attention.k.")
    return earlier and config.block_size == LENGTH and any(part in name for part in alone)


def test_every_combination_trains_every_parameter(build: Build, make_batch: MakeBatch) -> None:
    batch, count = make_batch(4, LENGTH, SYMBOLS), 0
    for config in combinations():
        assert not list(config.length_problems(LENGTH))
        model = build(config)
        terms = model(batch, corrupted(batch, config), step=StepSchedule())
        terms.loss.backward()
        assert terms.loss.isfinite()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (config, name)
            assert parameter.grad.isfinite().all(), (config, name)
            assert parameter.grad.any() or may_be_still(config, name), (config, name)
        count += 1
    assert count == 3 * (1 + 16) * 5 + 2 * 8 * 5


def test_every_combination_samples_the_same_in_any_batch(build: Build) -> None:
    prompt = torch.arange(2 * LENGTH).reshape(2, LENGTH) % SYMBOLS
    hidden = torch.ones_like(prompt, dtype=torch.bool)
    hidden[:, 0], hidden[1, 3] = False, False
    for config in itertools.islice(combinations(), 0, None, 2):
        model = build(config).eval()
        policies = Policies(latent="kept" if config.latent is None else "redrawn")
        both = SamplerState.start(prompt, hidden, mask_id=MASK, seed=3)
        alone = SamplerState.start(prompt[1:], hidden[1:], mask_id=MASK, seed=3, first_index=1)
        written = sample(model, both, policies, steps=3).tokens_BL
        assert (written < SYMBOLS).all()
        assert torch.equal(written[~hidden], prompt[~hidden])
        assert torch.equal(written[1:], sample(model, alone, policies, steps=3).tokens_BL), config


def test_every_combination_bears_a_batch_without_masks(build: Build, make_batch: MakeBatch) -> None:
    """No rank may skip a parameter: gradients exist and are zero."""
    batch = make_batch(2, LENGTH, SYMBOLS, maskable=0.0)
    for config in itertools.islice(combinations(), 0, None, 3):
        model = build(config)
        terms = model(batch, corrupted(batch, config), step=StepSchedule(statistics=True))
        terms.loss.backward()
        assert terms.loss == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_every_combination_computes_in_bfloat16(build: Build, make_batch: MakeBatch) -> None:
    """Sharded engines hand the model parameters in bfloat16."""
    batch = make_batch(4, LENGTH, SYMBOLS)
    for config in itertools.islice(combinations(), 0, None, 3):
        corruption = corrupted(batch, config)
        exact = build(config, scale=0.1)(batch, corruption, step=StepSchedule()).loss.item()
        model = build(config, scale=0.1).bfloat16()
        terms = model(batch, corruption, step=StepSchedule())
        terms.loss.backward()
        assert terms.loss.item() == pytest.approx(exact, rel=0.02)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


SPLIT = {
    "vadd": switched(latent=LatentConfig(dim=LATENT)),
    "block vmd": switched(2, LatentConfig(dim=LATENT, recognition=RecognitionConfig(pool="gated"))),
    "prior given x_t": switched(4, LatentConfig(dim=LATENT, prior="x_t", inject="embedding")),
    "prior given blocks": switched(2, LatentConfig(dim=LATENT, prior="earlier_blocks")),
    "samples of z": switched(4, LatentConfig(dim=LATENT, num_samples=3), AugmentationConfig(mse_weight=0.1)),
    "cadd": switched(augmentation=AugmentationConfig(mse_weight=0.3)),
    "block cadd": switched(2, augmentation=AugmentationConfig(fusion="reweight", path="vp")),
    "all": switched(4, LatentConfig(dim=LATENT), AugmentationConfig(fusion="concat", mse_weight=0.1)),
    "autoregressive": replace(PLAIN, autoregressive=True),
    "point": replace(
        PLAIN,
        backbone=PointMlpConfig(dim=DIM, num_layers=2, num_dimensions=LENGTH),
        time_conditioning=True,
        latent=LatentConfig(dim=2, inject="embedding"),
    ),
}


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
def test_micro_batches_add_up_to_the_batch(
    name: str, function: Callable[..., Corruption], build: Build, make_batch: MakeBatch
) -> None:
    config = SPLIT[name]
    model, batch = build(config), make_batch(6, LENGTH, SYMBOLS)
    key = NoiseKey(0, 3, batch.index_B)

    def terms_of(start: int, stop: int) -> LossTerms:
        part = batch.rows(start, stop)
        terms: LossTerms = model(part, function(part, key.rows(start, stop), config), step=StepSchedule(kl_weight=0.7))
        model.zero_grad()
        terms.loss.backward()
        return terms

    whole, expected = terms_of(0, 6), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    parts, found = [], [torch.zeros_like(gradient) for gradient in expected]
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        parts.append(terms_of(start, stop))
        for total, parameter in zip(found, model.parameters(), strict=True):
            assert parameter.grad is not None
            total += parameter.grad
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.allclose(torch.cat([part.loss_B for part in parts]), whole.loss_B, rtol=1e-5)
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm() + 1e-6


@pytest.mark.parametrize("name", SPLIT)
def test_rows_of_a_corruption_have_the_loss_of_the_rows(name: str, build: Build, make_batch: MakeBatch) -> None:
    model, batch = build(SPLIT[name]), make_batch(6, LENGTH, SYMBOLS)
    corruption = corrupted(batch, SPLIT[name])
    whole_B = model(batch, corruption, step=StepSchedule()).loss_B
    part_B = model(batch.rows(2, 5), corruption.rows(2, 5), step=StepSchedule()).loss_B
    assert torch.allclose(part_B, whole_B[2:5], rtol=1e-5)


@pytest.mark.parametrize("name", ["block vmd", "prior given blocks", "all"])
def test_recomputation_changes_no_gradient(name: str, build: Build, make_batch: MakeBatch) -> None:
    model, batch = build(SPLIT[name]), make_batch(4, LENGTH, SYMBOLS)
    corruption, results = corrupted(batch, SPLIT[name]), []
    choices: tuple[Recompute, ...] = ("none", "full", "selective")
    for recompute in choices:
        trunks = [module for module in model.modules() if isinstance(module, Transformer)]
        assert len(trunks) >= 2
        for trunk in trunks:
            trunk.recompute = recompute
        model.zero_grad()
        model(batch, corruption, step=StepSchedule()).loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, full, selective in zip(*results, strict=True):
        assert torch.equal(plain, full)
        assert torch.equal(plain, selective)


@pytest.mark.parametrize("name", ["vadd", "cadd", "all"])
def test_noise_is_new_at_every_step_and_for_every_sample(name: str, build: Build, make_batch: MakeBatch) -> None:
    """With the masks of another step kept, latents and hints still differ."""
    model, batch = build(SPLIT[name]), make_batch(4, LENGTH, SYMBOLS)
    corruption = corrupted(batch, SPLIT[name])
    again = replace(corruption, key=replace(corruption.key, step=1))
    swapped = replace(corruption, key=replace(corruption.key, index_B=corruption.key.index_B.flip(0)))
    losses = [model(batch, each, step=StepSchedule()).loss_B for each in (corruption, again, swapped, corruption)]
    assert torch.equal(losses[0], losses[3])
    for other in losses[1:3]:
        assert torch.equal(other != losses[0], corruption.masked_BL.any(1))


@torch.no_grad()
def test_latent_and_hint_noise_are_uncorrelated() -> None:
    """Streams of one key, and hints of different positions."""
    key = NoiseKey(0, 0, torch.arange(20))
    latent = key.stream("latent").normal(500).flatten()
    places = torch.arange(20).repeat_interleave(5), torch.arange(5).repeat(20)
    hint = key.stream("hint").at(*places).normal(500).view(20, 5, 500)
    draws = torch.stack((latent, *(hint[:, place].flatten() for place in range(5))))
    assert torch.corrcoef(draws).fill_diagonal_(0.0).abs().max() < 5 / 100


def test_statistics_are_gathered_when_asked_for(build: Build, make_batch: MakeBatch) -> None:
    config = SPLIT["block vmd"]
    model, batch = build(config), make_batch(6, LENGTH, SYMBOLS, maskable=0.5)
    corruption = corrupted(batch, config)
    assert model(batch, corruption, step=StepSchedule()).latent_sums is None
    assert build(SPLIT["cadd"])(batch, corruption, step=StepSchedule(statistics=True)).latent_sums is None
    sums = model(batch, corruption, step=StepSchedule(statistics=True)).latent_sums
    draw, chosen = model.draw_latent(batch, corruption), corruption.hidden_BS
    assert 0 < int(chosen.sum()) < chosen.numel()
    gaussian = Gaussian(draw.posterior.mean[chosen], draw.posterior.log_std[chosen])
    with torch.no_grad():
        assert torch.equal(sums, posterior_sums(gaussian, draw.z_BSd[chosen], draw.kl_BS[chosen]))
    assert sums[0] == chosen.sum()
    assert not sums.requires_grad


@pytest.mark.parametrize("modulation", ["per_block", "shared"])
@torch.no_grad()
def test_open_gates_start_equal_to_a_parent_without_conditions(modulation: str, make_batch: MakeBatch) -> None:
    """A latent added to a model that was trained without one (backbone.gates=one)."""
    backbone = replace(BACKBONE, condition_dim=8, gates="one", modulation=modulation)  # type: ignore[arg-type]
    config = replace(PLAIN, backbone=backbone, latent=LatentConfig(dim=LATENT))
    batch = make_batch(3, LENGTH, SYMBOLS)
    models = [MaskedDiffusion(each).double() for each in (PLAIN, config)]
    for model in models:
        initialise(model, 1, num_layers=1)
    x_t, z_BSd = corrupted(batch, PLAIN).x_t_BL, torch.randn(3, 1, LATENT, dtype=torch.float64)
    assert torch.allclose(models[1].denoise(x_t, latent=z_BSd), models[0].denoise(x_t), atol=1e-12)
    shut = MaskedDiffusion(replace(config, backbone=replace(backbone, gates="zero"))).double()
    initialise(shut, 1, num_layers=1)
    assert not torch.allclose(shut.denoise(x_t, latent=z_BSd), models[0].denoise(x_t), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "given", "sentence"),
    [
        (PLAIN, ("latent",), "trained without a latent: drop latent"),
        (PLAIN, ("hint",), "trained without a hint: drop hint"),
        (SPLIT["vadd"], (), "trained with a latent: pass latent"),
        (SPLIT["cadd"], (), "trained with a hint: pass hint"),
        (SPLIT["all"], ("latent",), "trained with a hint: pass hint"),
    ],
    ids=str,
)
def test_a_sampler_that_forgets_something_is_told(
    config: ModelConfig, given: tuple[str, ...], sentence: str, build: Build
) -> None:
    values = {"latent": torch.zeros(2, 1, LATENT), "hint": torch.zeros(2, LENGTH, DIM)}
    with pytest.raises(ValueError, match=sentence):
        build(config).denoise(torch.zeros(2, LENGTH, dtype=torch.int64), **{name: values[name] for name in given})  # type: ignore[arg-type]


def test_more_positions_than_were_trained_are_refused(build: Build) -> None:
    model = build(replace(PLAIN, backbone=replace(BACKBONE, max_positions=LENGTH)))
    model.denoise(torch.zeros(1, LENGTH, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"9 positions are more than backbone\.max_positions=8"):
        model.denoise(torch.zeros(1, LENGTH + 1, dtype=torch.int64))


@torch.no_grad()
def test_a_position_table_tells_masked_positions_apart(build: Build) -> None:
    """Rotary positions alone do not: every place of a fully masked sequence has the same hidden state."""
    x_t = torch.full((1, LENGTH), MASK)
    alike = build(PLAIN).denoise(x_t)
    assert torch.allclose(alike, alike[:, :1].expand_as(alike), atol=1e-12)
    apart = build(replace(PLAIN, backbone=replace(BACKBONE, max_positions=LENGTH))).denoise(x_t)[0]
    assert torch.pdist(apart).min() > 1e-2
