"""The bounds of a checkpoint: exact values by enumeration, and what they must not depend on."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data_pipeline.packing import Rows
from eval.likelihood import bound, estimate
from model.config import AugmentationConfig, LatentConfig, ModelConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise

MASK, LENGTH = 4, 3


class Symbols:
    """Rows of three symbols; the first of the last row is a prompt."""

    def __init__(self, rows: int = 6) -> None:
        self.tokens = torch.randint(4, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
        self.maskable = torch.ones(rows, LENGTH, dtype=torch.bool)
        self.maskable[-1, 0] = False

    def __len__(self) -> int:
        return len(self.tokens)

    def gather(self, indices: npt.NDArray[np.int64]) -> Rows:
        rows = torch.from_numpy(indices)
        return {
            "tokens": self.tokens[rows],
            "maskable": self.maskable[rows],
            "document": torch.zeros(len(rows), LENGTH, dtype=torch.int32),
            "positions": torch.arange(LENGTH).expand(len(rows), LENGTH),
        }


def perturbed(model: MaskedDiffusion) -> MaskedDiffusion:
    initialise(model, 0, num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


@pytest.fixture(scope="module")
def model() -> MaskedDiffusion:
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, dropout=0.5)
    return perturbed(MaskedDiffusion(ModelConfig(backbone=backbone, vocab_size=5, mask_id=MASK)))


@torch.inference_mode()
def exact(model: MaskedDiffusion, source: Symbols) -> float:
    """E over n uniform on 1..N and subsets of n of N / n times the cross-entropy, over all rows, per token."""
    model.eval()
    total = 0.0
    for tokens, maskable in zip(source.tokens, source.maskable, strict=True):
        free = maskable.nonzero()[:, 0].tolist()
        for n in range(1, len(free) + 1):
            subsets = list(itertools.combinations(free, n))
            for subset in subsets:
                x = tokens.clone()
                x[list(subset)] = MASK
                log_probs = model.logits(model.denoise(x[None])[0]).double().log_softmax(1)
                total -= sum(float(log_probs[i, tokens[i]]) for i in subset) / n / len(subsets)
    return total / int(source.maskable.sum())


def test_the_bound_is_the_enumerated_expectation(model: MaskedDiffusion) -> None:
    found = [bound(model, Symbols(), num_draws=100, seed=seed) for seed in range(10)]
    assert {f.tokens for f in found} == {17}
    error = float(np.std([f.value for f in found], ddof=1)) / math.sqrt(10)
    assert abs(np.mean([f.value for f in found]) - exact(model, Symbols())) < 5 * error
    assert error < 0.02


def test_the_error_is_the_spread_over_rows_however_many_draws(model: MaskedDiffusion) -> None:
    source = Symbols(64)
    source.maskable[:] = True
    rows = [Symbols(1) for _ in range(64)]
    for row, tokens in zip(rows, source.tokens, strict=True):
        row.tokens, row.maskable = tokens[None], torch.ones(1, LENGTH, dtype=torch.bool)
    spread = float(np.std([exact(model, row) for row in rows]))
    assert bound(model, source, num_draws=300).error == pytest.approx(spread / math.sqrt(64), rel=0.1)


def test_a_uniform_model_has_the_entropy_of_the_symbols(model: MaskedDiffusion) -> None:
    blind = MaskedDiffusion(model.config)
    assert blind.denoiser.head is not None
    with torch.no_grad():
        blind.denoiser.head.weight.zero_()
    found = bound(blind, Symbols(), num_draws=3)
    assert found.value == pytest.approx(math.log(4), rel=1e-6)
    assert found.error < 1e-4


def test_the_batch_size_and_the_mode_change_nothing(model: MaskedDiffusion) -> None:
    model.train()
    whole = bound(model, Symbols(), num_draws=2)
    for batch_size in (1, 4):
        other = bound(model, Symbols(), num_draws=2, batch_size=batch_size)
        assert other.value == pytest.approx(whole.value, rel=1e-6)
        assert other.tokens == whole.tokens
    assert bound(model, Symbols(), num_draws=2).value == whole.value
    assert bound(model, Symbols(), num_draws=2, seed=1).value != whole.value


def test_only_the_first_rows_are_measured(model: MaskedDiffusion) -> None:
    part, whole = Symbols(), Symbols()
    part.tokens, part.maskable = part.tokens[:2], part.maskable[:2]
    found = bound(model, whole, num_sequences=2, num_draws=3)
    assert found == bound(model, part, num_draws=3)
    assert bound(model, part, num_sequences=100, num_draws=3) == found


def subsets(positions: Iterable[int]) -> list[tuple[int, ...]]:
    chosen = tuple(positions)
    return [part for n in range(len(chosen) + 1) for part in itertools.combinations(chosen, n)]


@torch.inference_mode()
def test_nelbo_steps_is_above_the_truth_of_the_sampler_it_names(model: MaskedDiffusion) -> None:
    """Three ancestral steps of a model without latent, by every path."""
    source, steps = Symbols(4), 3
    states = list(itertools.product(range(MASK + 1), repeat=LENGTH))
    log_probs = model.logits(model.denoise(torch.tensor(states)).flatten(0, 1)).double().log_softmax(1)
    nats = dict(zip(states, -log_probs.view(-1, LENGTH, MASK + 1), strict=True))
    truth = expected = 0.0
    for row, maskable in zip(source.tokens, source.maskable, strict=True):
        free = maskable.nonzero()[:, 0].tolist()
        now = {tuple(free): 1.0}
        for step in range(steps):
            flip, later = 1 / (steps - step), dict.fromkeys(subsets(free), 0.0)
            for masked, probability in now.items():
                x = tuple(MASK if i in masked else int(v) for i, v in enumerate(row))
                cost = [float(nats[x][i, row[i]]) for i in range(LENGTH)]
                chance = (1 - step / steps) ** len(masked) * (step / steps) ** (len(free) - len(masked))
                expected += chance * flip * sum(cost[i] for i in masked)
                for shown in subsets(masked):
                    left = tuple(i for i in masked if i not in shown)
                    moves = flip ** len(shown) * (1 - flip) ** len(left)
                    later[left] += probability * moves * math.exp(-sum(cost[i] for i in shown))
            now = later
        truth -= math.log(now[()])
    found = [estimate(model, source, "nelbo_steps", num_steps=steps, num_draws=120, seed=seed) for seed in range(8)]
    assert {f.kind for f in found} == {"nelbo_steps[3]"}
    values = np.array([f.value * f.tokens for f in found])
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    assert truth < expected
    assert abs(values.mean() - expected) < 5 * error
    assert error < 0.2


def test_without_switches_the_named_bounds_are_the_cheap_one(model: MaskedDiffusion) -> None:
    cheap = bound(model, Symbols(), num_draws=3)
    for kind in ("nelbo", "delbo"):
        found = estimate(model, Symbols(), kind, num_draws=3, num_latents=7)
        assert (found.kind, found.tokens) == (kind, cheap.tokens)
        assert found.value == pytest.approx(cheap.value, rel=1e-6)
        assert found.error == pytest.approx(cheap.error, rel=1e-6)
    assert cheap.kind == "nelbo"


@pytest.fixture(scope="module")
def tied(model: MaskedDiffusion) -> MaskedDiffusion:
    backbone = replace(model.config.backbone, condition_dim=8)
    config = replace(model.config, backbone=backbone, latent=LatentConfig(dim=2), time_conditioning=True)
    return perturbed(MaskedDiffusion(config))


@pytest.fixture(scope="module")
def hinted(model: MaskedDiffusion) -> MaskedDiffusion:
    return perturbed(MaskedDiffusion(replace(model.config, augmentation=AugmentationConfig())))


def test_every_kind_depends_on_rows_and_seed_alone(tied: MaskedDiffusion, hinted: MaskedDiffusion) -> None:
    of_tied = ("nelbo", "delbo", "nelbo_kept", "nelbo_steps")
    for model, kind in (*((tied, kind) for kind in of_tied), (hinted, "nll_discrete"), (hinted, "nelbo_steps")):
        options = {"num_steps": 2, "num_latents": 4, "num_draws": 2}
        whole = estimate(model, Symbols(), kind, **options)
        parts = estimate(model, Symbols(), kind, batch_size=4, **options)
        assert parts.value == pytest.approx(whole.value, rel=1e-5)
        assert parts.error == pytest.approx(whole.error, rel=1e-4)
        assert estimate(model, Symbols(), kind, seed=1, **options).value != whole.value
        assert whole.kind == {
            ("nelbo_steps", True): "nelbo_steps[2]_hard",
            ("nelbo_steps", False): "nelbo_steps[2]",
        }.get((kind, model is hinted), kind)
        assert whole.error > 0


def test_draws_and_samples_of_z_make_estimates_settle(tied: MaskedDiffusion) -> None:
    def scatter(**options: int) -> float:
        return float(np.std([estimate(tied, Symbols(), "nelbo", seed=seed, **options).value for seed in range(12)]))

    assert scatter(num_draws=16) < 0.6 * scatter(num_draws=1)
    assert scatter(num_latents=32) < scatter(num_latents=1)


def test_kinds_that_do_not_exist_or_fit_are_refused(model: MaskedDiffusion) -> None:
    with pytest.raises(ValueError, match="'elbo' is not a bound: use one of nelbo, nelbo_steps, nelbo_kept, delbo"):
        estimate(model, Symbols(), "elbo")
    with pytest.raises(ValueError, match="nelbo_kept needs a model with a latent"):
        estimate(model, Symbols(), "nelbo_kept")
