"""Bounds of models with blocks against exact likelihoods, and what estimates must not depend on.

Shapes: B rows, L positions, S blocks, G nodes of each z, d = 1.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from model import importance
from model.batch import Batch
from model.bounds import delbo, nelbo, nelbo_kept, nll_discrete
from model.config import (
    AugmentationConfig,
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    TransformerConfig,
)
from model.corruption import corrupt_uniform_count
from model.diffusion import MaskedDiffusion, StepSchedule
from model.initialisation import initialise
from model.latent import PartlyMaskedPrior
from model.masks import MaskSpec
from model.noise import NoiseKey
from model.step_bound import nelbo_steps

LENGTH, SYMBOLS, MASK = 4, 2, 2
SEQUENCES = list(itertools.product(range(SYMBOLS), repeat=LENGTH))
ORDERS = list(itertools.permutations(range(2)))
Z_G = torch.linspace(-7.0, 7.0, 43, dtype=torch.float64)
DZ = float(Z_G[1] - Z_G[0])

BACKBONE = TransformerConfig(dim=8, num_layers=1, num_heads=2, max_positions=LENGTH)
PLAIN = ModelConfig(backbone=BACKBONE, vocab_size=SYMBOLS + 1, mask_id=MASK)
LATENT = LatentConfig(dim=1, recognition=RecognitionConfig(num_layers=1))
TIED = replace(PLAIN, backbone=replace(BACKBONE, condition_dim=8), latent=LATENT)
HINTED = replace(PLAIN, augmentation=AugmentationConfig())


def build(config: ModelConfig) -> MaskedDiffusion:
    model = MaskedDiffusion(config)
    initialise(model, 0, num_layers=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if "latent" in name and "head" in name:  # r and p(z) differ, but estimates with their ratio settle soon
                parameter.mul_(0.02 if config.backbone.kind == "point_mlp" else 0.3)
    return model.eval()


def batch_of(sequences: Sequence[Sequence[int]], copies: int = 1, prompt: Sequence[int] = ()) -> Batch:
    tokens_BL = torch.tensor(sequences).repeat_interleave(copies, 0)
    maskable_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    maskable_BL[:, list(prompt)] = False
    index_B = torch.arange(len(tokens_BL))
    return Batch(tokens_BL, maskable_BL, torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL), index_B)


def key_of(batch: Batch, seed: int = 0) -> NoiseKey:
    return NoiseKey(seed, 0, batch.index_B)


@torch.no_grad()
def log_probs(model: MaskedDiffusion, x_BL: Tensor, latent_BSd: Tensor | None = None) -> Tensor:
    """[B, L, V] of what a sampler sees: one stream, earlier blocks clean."""
    hidden = model.denoise(x_BL, latent=latent_BSd)
    return model.logits(hidden.flatten(0, 1)).double().log_softmax(1).view(*x_BL.shape, -1)


@pytest.mark.parametrize("config", [replace(PLAIN, block_size=1), replace(PLAIN, autoregressive=True)])
def test_one_token_a_block_is_an_exact_autoregressive_likelihood(config: ModelConfig) -> None:
    model, batch = build(config), batch_of(SEQUENCES)
    for name, estimate in (("nelbo", nelbo), ("delbo", delbo)):
        found = [estimate(model, batch, key_of(batch, seed)) for seed in range(2)]
        assert torch.equal(found[0], found[1]), f"{name} has nothing to draw"
        assert float((-found[0]).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    expected_B = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for position in range(LENGTH):
        x_BL = batch.tokens_BL[:, : position + 1].clone()
        x_BL[:, position] = MASK
        expected_B -= log_probs(model, x_BL)[:, position].gather(1, batch.tokens_BL[:, position, None])[:, 0]
    torch.testing.assert_close(nelbo(model, batch, key_of(batch)), expected_B, atol=2e-5, rtol=0)
    if config.block_size:
        steps_B = nelbo_steps(model, batch, key_of(batch), num_steps=1)
        torch.testing.assert_close(steps_B, expected_B, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", [PLAIN, TIED], ids=["plain", "tied"])
def test_one_block_of_the_whole_row_is_the_plain_model(config: ModelConfig) -> None:
    plain, batch = build(config), batch_of(SEQUENCES)
    blocks = MaskedDiffusion(replace(config, block_size=LENGTH)).eval()
    blocks.load_state_dict(plain.state_dict())
    estimates = [
        lambda model: nelbo(model, batch, key_of(batch), num_latents=3),
        lambda model: delbo(model, batch, key_of(batch), num_latents=3),
        lambda model: nelbo_steps(model, batch, key_of(batch), num_steps=2, num_latents=3),
    ]
    for estimate in estimates + ([lambda m: nelbo_kept(m, batch, key_of(batch))] if config.latent else []):
        torch.testing.assert_close(estimate(plain), estimate(blocks), atol=1e-4, rtol=1e-5)


def plain_block(nats: dict[tuple[int, ...], Tensor], x: Sequence[int], block: int) -> tuple[float, float]:
    """-log p of one block of two tokens given the blocks before, and its nelbo."""
    start, paths = 2 * block, []
    for order in ORDERS:
        seen, path = [*x[:start], MASK, MASK], 0.0
        for place in order:
            path += float(nats[tuple(seen)][start + place, x[start + place]])
            seen[start + place] = x[start + place]
        paths.append(path)
    return -math.log(sum(math.exp(-path) for path in paths) / 2), sum(paths) / 2


def test_nelbo_with_blocks_is_the_sum_over_blocks_and_never_below_the_truth() -> None:
    model = build(replace(PLAIN, block_size=2))
    nats: dict[tuple[int, ...], Tensor] = {}
    for length in (2, 4):
        states = list(itertools.product(range(SYMBOLS + 1), repeat=length))
        nats |= dict(zip(states, -log_probs(model, torch.tensor(states)), strict=True))
    parts = [[plain_block(nats, x, block) for block in range(2)] for x in SEQUENCES]
    assert sum(math.exp(-sum(p for p, _ in pair)) for pair in parts) == pytest.approx(1.0, abs=1e-6)
    expected = torch.tensor([sum(b for _, b in pair) for pair in parts], dtype=torch.float64)
    batch = batch_of(SEQUENCES, 600)
    found = nelbo(model, batch, key_of(batch)).view(len(SEQUENCES), -1)
    error = found.std(1) / math.sqrt(found.shape[1])
    assert ((found.mean(1) - expected).abs() / error).max() < 5
    assert error.max() < 0.07
    assert all(bound > exact for pair in parts for exact, bound in pair)


class TwoBlocks:
    """One sequence of two blocks of two tokens, each with a z that is kept, on a grid of both."""

    def __init__(self, model: MaskedDiffusion, x: Sequence[int]) -> None:
        self.model, self.x = model, x
        first_G, second_G = Z_G.repeat_interleave(len(Z_G)), Z_G.repeat(len(Z_G))
        self.latents = (Z_G[:, None, None].float(), torch.stack((first_G, second_G), 1)[..., None].float())
        self.tables: dict[tuple[int, ...], Tensor] = {}

    def log_mu(self, block: int, masked: tuple[int, ...]) -> Tensor:
        """Of the true tokens [nodes, L]; `masked` are places of the block."""
        if (block, *masked) not in self.tables:
            x = list(self.x[: 2 * block + 2])
            for place in masked:
                x[2 * block + place] = MASK
            latent = self.latents[block]
            found = log_probs(self.model, torch.tensor(x).expand(len(latent), -1), latent)
            self.tables[block, *masked] = found[:, range(len(x)), self.x[: len(x)]][:, 2 * block :]
        return self.tables[block, *masked]

    def log_likelihood(self, block: int) -> Tensor:
        """Over both orders."""
        paths = [sum(self.log_mu(block, tuple(sorted(o[n:])))[:, o[n]] for n in range(2)) for o in ORDERS]
        return torch.stack(paths).logsumexp(0) - math.log(2.0)

    def cross_entropy(self, block: int) -> Tensor:
        """The integral of w(t) CE: n = 1 weighs 2 and is one of two subsets, n = 2 weighs 1."""
        return -sum(self.log_mu(block, (p,))[:, p] for p in range(2)) / 2 - self.log_mu(block, (0, 1)).sum(1) / 2

    @torch.no_grad()
    def densities(self) -> tuple[Normal, Normal, Normal, Normal]:
        """r(z^1), r(z^2), p(z^1) and p(z^2 | z^1), the last at every node of z^1."""
        assert self.model.latent is not None
        whole_BL, t_BS = torch.ones(1, LENGTH, dtype=torch.bool), torch.ones(1, 2)
        r = self.model.latent.recognition(torch.tensor([self.x]), whole_BL, whole_BL, t_BS=t_BS, num_segments=2)
        posteriors = [Normal(r.mean[0, b, 0].double(), r.log_std[0, b, 0].double().exp()) for b in range(2)]
        if self.model.latent.prior is None:
            return *posteriors, Normal(0.0, 1.0), Normal(torch.zeros_like(Z_G), 1.0)
        if isinstance(self.model.latent.prior, PartlyMaskedPrior):
            first, second = (self._prior_of_hidden(self.model.latent.prior, block) for block in range(2))
            return *posteriors, first, Normal(second.mean.expand_as(Z_G), second.stddev)
        p = self.model.latent.prior(self.latents[0])
        mean, std = p.mean.double()[..., 0], p.log_std.double().exp()[..., 0]
        return *posteriors, Normal(mean[0, 0], std[0, 0]), Normal(mean[:, 1], std[:, 1])

    def _prior_of_hidden(self, prior: PartlyMaskedPrior, block: int) -> Normal:
        """p(z^b | x_t) as a sampler meets it: one stream, blocks before are clean and the block is hidden."""
        canvas_1L = torch.tensor([[*self.x[: 2 * block], MASK, MASK]])
        every_1L = torch.ones_like(canvas_1L, dtype=torch.bool)
        p = prior(canvas_1L, MaskSpec(block_size=2), None, every_1L, block + 1)
        return Normal(p.mean[0, -1, 0].double(), p.log_std[0, -1, 0].double().exp())

    def exact(self) -> float:
        _, _, first, second = self.densities()
        log_G = first.log_prob(Z_G) + self.log_likelihood(0)
        log_GG = second.log_prob(Z_G[:, None]).T + self.log_likelihood(1).view(len(Z_G), -1)
        return -float((log_G + (log_GG.exp().sum(1) * DZ).log()).logsumexp(0)) - math.log(DZ)

    def bound(self) -> float:
        own, later, first, second = self.densities()
        weight_G, later_G = own.log_prob(Z_G).exp() * DZ, later.log_prob(Z_G).exp() * DZ
        cost_G = self.cross_entropy(0) + self.cross_entropy(1).view(len(Z_G), -1) @ later_G
        return float(weight_G @ (cost_G + kl_divergence(later, second))) + float(kl_divergence(own, first))


@pytest.mark.parametrize("prior", ["normal", "x_t", "earlier_blocks"])
def test_nelbo_kept_with_blocks_is_above_the_truth_and_what_quadrature_says(prior: str) -> None:
    model = build(replace(TIED, block_size=2, latent=replace(LATENT, prior=prior)))
    chosen = SEQUENCES[::3]
    references = [TwoBlocks(model, x) for x in chosen]
    expected = torch.tensor([r.bound() for r in references], dtype=torch.float64)
    for reference, value in zip(references, expected, strict=True):
        assert value > reference.exact()
    batch = batch_of(chosen, 1000)
    found = nelbo_kept(model, batch, key_of(batch)).view(len(chosen), -1)
    error = found.std(1) / math.sqrt(found.shape[1])
    assert ((found.mean(1) - expected).abs() / error).max() < 5
    assert error.max() < 0.1


def test_the_exact_likelihoods_of_blocks_are_a_distribution() -> None:
    model = build(replace(TIED, block_size=2, latent=replace(LATENT, prior="earlier_blocks")))
    assert sum(math.exp(-TwoBlocks(model, x).exact()) for x in SEQUENCES) == pytest.approx(1.0, abs=1e-5)


ALL = {
    "normal": TIED,
    "x_t": replace(TIED, latent=replace(LATENT, prior="x_t")),
    "blocks": replace(TIED, block_size=2),
    "blocks, x_t": replace(TIED, block_size=2, latent=replace(LATENT, prior="x_t", dim=3)),
    "blocks, in turn": replace(TIED, block_size=2, latent=replace(LATENT, prior="earlier_blocks", dim=2)),
    "plain": PLAIN,
    "point": ModelConfig(
        backbone=PointMlpConfig(dim=8, num_layers=2, num_dimensions=LENGTH),
        vocab_size=SYMBOLS + 1,
        mask_id=MASK,
        latent=LatentConfig(dim=2, inject="embedding"),
    ),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prompt", [(), (0, 1), (3,)], ids=["free", "block", "token"])
def test_delbo_with_one_sample_is_the_training_loss_in_expectation(name: str, prompt: tuple[int, ...]) -> None:
    """The same corruptions, so that only the draws of z differ."""
    model, batch = build(ALL[name]), batch_of(SEQUENCES, 200, prompt)
    key = key_of(batch)
    with torch.no_grad():
        terms = model(batch, corrupt_uniform_count(batch, key, model.config), step=StepSchedule())
    difference_B = delbo(model, batch, key) - terms.loss_B
    error = float(difference_B.std()) / math.sqrt(len(difference_B))
    assert abs(float(difference_B.mean())) < 4 * error + 1e-5
    assert error < 0.2


@pytest.mark.parametrize("name", ["blocks", "blocks, x_t", "blocks, in turn"])
def test_delbo_of_blocks_falls_with_the_number_of_samples(name: str) -> None:
    model, batch = build(ALL[name]), batch_of(SEQUENCES, 60, (0, 1) if name == "blocks, in turn" else ())
    means = [float(delbo(model, batch, key_of(batch), num_latents=k).mean()) for k in (1, 4, 40)]
    assert means[0] > means[1] > means[2]


def every_estimate(model: MaskedDiffusion, batch: Batch) -> dict[str, Tensor]:
    key, config = key_of(batch), model.config
    if config.augmentation is not None:
        steps = nelbo_steps(model, batch, key, num_steps=3, num_latents=3, num_hints=2, z0="soft")
        return {"nll_discrete": nll_discrete(model, batch, key), "nelbo_steps": steps}
    found = {"delbo": delbo(model, batch, key, num_latents=5)}
    if config.latent is not None:
        found["nelbo_kept"] = nelbo_kept(model, batch, key)
    if config.latent is None or not config.block_size:
        found["nelbo"] = nelbo(model, batch, key, num_latents=5)
        found["nelbo_steps"] = nelbo_steps(model, batch, key, num_steps=3, num_latents=5)
    return found


SWEEP = ALL | {
    "hints": HINTED,
    "hints, blocks": replace(HINTED, block_size=2),
    "hints, z": replace(TIED, augmentation=AugmentationConfig(path="vp", fusion="reweight")),
}


@pytest.mark.parametrize("name", SWEEP)
def test_estimates_depend_on_the_row_and_the_key_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(SWEEP[name]), batch_of(SEQUENCES, 3)
    whole = every_estimate(model, batch)
    monkeypatch.setattr(importance, "POSITIONS_AT_ONCE", 2 * batch.tokens_BL.numel())
    for estimate, found_B in every_estimate(model, batch).items():
        torch.testing.assert_close(found_B, whole[estimate], atol=1e-4, rtol=1e-4, msg=f"{estimate} in chunks of z")
    parts = [every_estimate(model, batch.rows(start, start + 16)) for start in range(0, 48, 16)]
    for estimate, found_B in whole.items():
        assert found_B.dtype == torch.float64
        assert found_B.isfinite().all()
        together_B = torch.cat([part[estimate] for part in parts])
        torch.testing.assert_close(together_B, found_B, atol=1e-4, rtol=1e-4, msg=f"{estimate} in parts")


def test_nothing_maskable_costs_nothing() -> None:
    for name in SWEEP:
        model, batch = build(SWEEP[name]), batch_of(SEQUENCES, 1, range(LENGTH))
        for estimate, found_B in every_estimate(model, batch).items():
            assert not found_B.any(), f"{estimate} of {name}"


@pytest.mark.parametrize(
    ("config", "estimate", "message"),
    [
        (HINTED, nelbo, "nelbo of a model with augmentation would read hints .*: use nelbo_steps"),
        (HINTED, delbo, "delbo of a model with augmentation"),
        (replace(TIED, augmentation=AugmentationConfig()), nelbo_kept, "nelbo_kept of a model with augmentation"),
        (PLAIN, nll_discrete, "nll_discrete needs a model with augmentation: use nelbo"),
        (TIED, nll_discrete, "nll_discrete needs a model with augmentation: use delbo"),
        (PLAIN, nelbo_kept, "nelbo_kept needs a model with a latent.*: use nelbo"),
        (replace(TIED, block_size=2), nelbo, "nelbo is for a z that is drawn anew .*: use nelbo_kept"),
        (replace(TIED, block_size=2), nelbo_steps, "nelbo_steps is for a z that is drawn anew .*: use nelbo_kept"),
        (replace(PLAIN, autoregressive=True), nelbo_steps, "an autoregressive model writes one token a step"),
    ],
)
def test_bounds_that_a_model_has_not_are_refused(config: ModelConfig, estimate: object, message: str) -> None:
    model, batch = build(config), batch_of(SEQUENCES)
    options = {"num_steps": 2} if estimate is nelbo_steps else {}
    with pytest.raises(ValueError, match=message):
        estimate(model, batch, key_of(batch), **options)  # type: ignore[operator]


def test_counts_below_one_are_refused() -> None:
    model, batch = build(TIED), batch_of(SEQUENCES)
    with pytest.raises(ValueError, match="num_latents=0 must be at least 1"):
        nelbo(model, batch, key_of(batch), num_latents=0)
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        nelbo_steps(model, batch, key_of(batch), num_steps=0)
    with pytest.raises(ValueError, match="num_hints=2 needs a model with augmentation: use 1"):
        nelbo_steps(model, batch, key_of(batch), num_steps=1, num_hints=2)
