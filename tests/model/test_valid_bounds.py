"""Bounds against exact likelihoods of their samplers: paths by enumeration, z and hints by quadrature.

The references know the model only as a sampler does: `denoise` on one stream, the recognition network and the prior.

Shapes: B rows, L positions, G nodes of z, n masked positions, d = 1.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from model.batch import Batch
from model.bounds import delbo, nelbo, nelbo_kept
from model.config import (
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    ScheduleConfig,
    TransformerConfig,
)
from model.corruption import Corruption
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from model.latent import Gaussian, standard_normal
from model.masks import MaskSpec
from model.noise import NoiseKey
from model.step_bound import nelbo_steps

LENGTH, SYMBOLS, MASK = 3, 2, 2
Z_G = torch.linspace(-8.0, 8.0, 81, dtype=torch.float64)
DZ = float(Z_G[1] - Z_G[0])

BACKBONE = TransformerConfig(dim=8, num_layers=1, num_heads=2, max_positions=4)
MODULATED = replace(BACKBONE, condition_dim=8)
TIED = LatentConfig(dim=1, recognition=RecognitionConfig(num_layers=1))
ADDED = LatentConfig(dim=1, inject="embedding", prior="x_t", recognition=RecognitionConfig(marks="added", pool="gated"))
SEQUENCES = list(itertools.product(range(SYMBOLS), repeat=LENGTH))
CONFIGS = {
    "plain": ModelConfig(backbone=BACKBONE, vocab_size=SYMBOLS + 1, mask_id=MASK),
    "adaln": ModelConfig(backbone=MODULATED, vocab_size=SYMBOLS + 1, mask_id=MASK, latent=TIED),
    "added": ModelConfig(backbone=BACKBONE, vocab_size=SYMBOLS + 1, mask_id=MASK, latent=ADDED),
    "timed": ModelConfig(backbone=MODULATED, vocab_size=SYMBOLS + 1, mask_id=MASK, latent=TIED, time_conditioning=True),
    "geometric": ModelConfig(
        backbone=BACKBONE,
        vocab_size=SYMBOLS + 1,
        mask_id=MASK,
        schedule=ScheduleConfig(kind="geometric", beta_min=0.1, beta_max=2.0),
    ),
    "point": ModelConfig(
        backbone=PointMlpConfig(dim=8, num_layers=2),
        vocab_size=SYMBOLS + 1,
        mask_id=MASK,
        latent=LatentConfig(dim=1, inject="embedding"),
    ),
}
TIMELESS = ("plain", "adaln", "added")
PROMPTS = {"added": (1,)}
"""Positions that are never masked."""
COPIES = 1000


def build(config: ModelConfig, *, spread: float = 0.3) -> MaskedDiffusion:
    """Random weights, large enough that positions, z and hints matter."""
    model = MaskedDiffusion(config)
    initialise(model, 0, num_layers=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
            if "latent" in name and "head" in name:  # r and p(z) differ, but estimates with their ratio settle soon
                parameter.mul_(0.1 if config.backbone.kind == "point_mlp" else 0.3)
    return model.eval()


def batch_of(sequences: Sequence[Sequence[int]], copies: int, prompt: Sequence[int] = ()) -> Batch:
    tokens_BL = torch.tensor(sequences).repeat_interleave(copies, 0)
    maskable_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    maskable_BL[:, list(prompt)] = False
    index_B = torch.arange(len(tokens_BL))
    return Batch(tokens_BL, maskable_BL, torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL), index_B)


def every(batch: Batch, n: int) -> Batch:
    """Every n-th row."""
    rows = {name: tensor[::n] for name, tensor in vars(batch).items() if tensor is not None}
    return Batch(**rows)


def key_of(batch: Batch, seed: int = 0) -> NoiseKey:
    return NoiseKey(seed, 0, batch.index_B)


def assert_mean(found_B: Tensor, expected: Sequence[float]) -> None:
    """The mean over the copies of each sequence, and over all of them, within 5 standard errors."""
    found = found_B.view(len(expected), -1)
    error = found.std(1) / math.sqrt(found.shape[1]) + 1e-6
    miss = found.mean(1) - torch.tensor(expected, dtype=torch.float64)
    assert (miss / error).abs().max() < 5
    assert abs(miss.sum()) < 5 * error.square().sum().sqrt()
    assert error.max() < 0.2


def hide(x: Sequence[int], masked: Sequence[int]) -> list[int]:
    return [MASK if position in masked else symbol for position, symbol in enumerate(x)]


def subsets(positions: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for n in range(len(positions) + 1):
        yield from itertools.combinations(positions, n)


@torch.no_grad()
def log_mu(model: MaskedDiffusion, x_t: Sequence[int], t: float = 0.5) -> Tensor:
    """Log-probabilities [G, L, V] of every symbol for every z (without a latent, the same for all)."""
    nodes = len(Z_G) if model.latent is not None else 1
    latent = Z_G.float()[:, None, None] if model.latent is not None else None
    x_GL = torch.tensor([x_t]).expand(nodes, -1)
    hidden = model.denoise(x_GL, t=torch.full((nodes,), t), latent=latent)
    logits = model.logits(hidden.flatten(0, 1), torch.arange(x_GL.numel())).view(nodes, len(x_t), -1)
    return logits.double().log_softmax(-1)


class Reference:
    """Everything about one sequence, by quadrature over z and enumeration over what is masked."""

    def __init__(self, model: MaskedDiffusion, x: Sequence[int], prompt: Sequence[int] = ()) -> None:
        self.model, self.x, self.free = model, x, tuple(i for i in range(len(x)) if i not in prompt)
        self.maskable_BL = torch.tensor([[i in self.free for i in range(len(x))]])
        for name in ("log_mu", "prior", "posterior", "cost"):
            setattr(self, name, cache(getattr(self, name)))

    def log_mu(self, masked: Sequence[int], t: float = 0.5) -> Tensor:
        """Of the true token at every position, [G, L]."""
        return log_mu(self.model, hide(self.x, masked), t)[:, range(len(self.x)), self.x]

    @torch.no_grad()
    def prior(self, masked: Sequence[int]) -> Normal:
        latent = self.model.latent
        assert latent is not None
        if latent.prior is None:
            return Normal(torch.zeros((), dtype=torch.float64), 1.0)
        return normal(latent.prior(torch.tensor([hide(self.x, masked)]), MaskSpec(), None, self.maskable_BL, 1))

    @torch.no_grad()
    def posterior(self, masked: Sequence[int], t: float = 0.5) -> Normal:
        latent = self.model.latent
        assert latent is not None
        masked_BL = torch.tensor([[i in masked for i in range(len(self.x))]])
        t_BS = torch.full((1, 1), t)
        return normal(
            latent.recognition(torch.tensor([self.x]), masked_BL, self.maskable_BL, t_BS=t_BS, num_segments=1)
        )

    def marginal(self, masked: Sequence[int], revealed: Sequence[int], t: float = 0.5) -> float:
        """Integral of p(z) times the probabilities of the revealed tokens."""
        joint_G = self.log_mu(masked, t)[:, list(revealed)].sum(1)
        if self.model.latent is None:
            return float(joint_G.exp())
        return float((joint_G + self.prior(masked).log_prob(Z_G)).exp().sum() * DZ)

    def cost(self, masked: Sequence[int], revealed: Sequence[int], num_latents: int, t: float = 0.5) -> float:
        """Expectation of -log mean_k [prod mu^i p / r], with one sample, two, or infinitely many (0)."""
        if num_latents == 0 or self.model.latent is None:
            return -math.log(self.marginal(masked, revealed, t))
        log_r_G = self.posterior(masked, t).log_prob(Z_G)
        weight_G = log_r_G.exp() * DZ
        value_G = self.log_mu(masked, t)[:, list(revealed)].sum(1) + self.prior(masked).log_prob(Z_G) - log_r_G
        if num_latents == 1:
            return -float(weight_G @ value_G)
        both_GG = torch.logaddexp(value_G[:, None], value_G[None]) - math.log(2.0)
        return -float(weight_G @ both_GG @ weight_G)

    def over_counts(self, cost: Callable[[tuple[int, ...]], float]) -> float:
        """Expectation over n uniform on 1..N and subsets of n, with weight N / n."""
        total = 0.0
        for masked in subsets(self.free):
            if masked:
                total += cost(masked) / len(masked) / math.comb(len(self.free), len(masked))
        return total

    def nelbo(self, num_latents: int) -> float:
        return self.over_counts(lambda masked: sum(self.cost(masked, (i,), num_latents) for i in masked))

    def delbo(self, num_latents: int) -> float:
        return self.over_counts(lambda masked: self.cost(masked, masked, num_latents))

    def nelbo_kept(self) -> float:
        posterior = self.posterior(self.free, 1.0)
        ce_G = torch.zeros_like(Z_G)
        for masked in subsets(self.free):
            if masked:
                scale = 1.0 / len(masked) / math.comb(len(self.free), len(masked))
                ce_G -= scale * self.log_mu(masked)[:, list(masked)].sum(1)
        kl = kl_divergence(posterior, self.prior(self.free))
        return float(posterior.log_prob(Z_G).exp() @ ce_G * DZ + kl)

    def nelbo_steps(self, num_steps: int, num_latents: int) -> float:
        total = 0.0
        for masked, t, flip, chance in self.moves(num_steps):
            for revealed in subsets(masked):
                if revealed:
                    probability = flip ** len(revealed) * (1 - flip) ** (len(masked) - len(revealed))
                    total += chance * probability * self.cost(masked, revealed, num_latents, t) if probability else 0.0
        return total

    def times(self, num_steps: int) -> Iterator[tuple[float, float]]:
        """Every t of the sampler, and the probability that a hidden token is revealed there."""
        for step in range(num_steps):
            t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
            alpha_t, alpha_s = (alpha(self.model.config.schedule, u) for u in (t, s))
            yield t, (alpha_s - alpha_t) / (1 - alpha_t) if s > 0 else 1.0

    def moves(self, num_steps: int) -> Iterator[tuple[tuple[int, ...], float, float, float]]:
        """What may be masked at each step: positions, t, rho_flip, and how likely that is."""
        hidden = 1.0
        for t, flip in self.times(num_steps):
            for masked in subsets(self.free):
                yield masked, t, flip, hidden ** len(masked) * (1 - hidden) ** (len(self.free) - len(masked))
            hidden *= 1 - flip

    def exact_fresh(self) -> float:
        """-log p(x) of one token at a time in a random order, a fresh z for each."""
        paths = list(itertools.permutations(self.free))
        products = [math.prod(self.marginal(order[n:], [order[n]]) for n in range(len(order))) for order in paths]
        return -math.log(sum(products) / len(paths))

    def exact_kept(self) -> float:
        """-log p(x) of one token at a time in a random order, under one z."""
        paths = list(itertools.permutations(self.free))
        log_p_G = torch.stack(
            [sum(self.log_mu(order[n:])[:, order[n]] for n in range(len(order))) for order in paths]
        ).logsumexp(0) - math.log(len(paths))
        prior = self.prior(self.free)
        return -math.log(float((log_p_G + prior.log_prob(Z_G)).exp().sum() * DZ))

    def exact_steps(self, num_steps: int) -> float:
        """-log p(x) of the ancestral sampler with a fresh z at each step, by what is still masked."""
        now = {tuple(self.free): 1.0}
        for t, flip in self.times(num_steps):
            later: dict[tuple[int, ...], float] = {}
            for masked, probability in now.items():
                for revealed in subsets(masked):
                    left = tuple(i for i in masked if i not in revealed)
                    chance = flip ** len(revealed) * (1 - flip) ** len(left)
                    if chance:
                        reached = probability * chance * self.marginal(masked, revealed, t)
                        later[left] = later.get(left, 0.0) + reached
            now = later
        return -math.log(now[()])


def alpha(schedule: ScheduleConfig, t: float) -> float:
    if schedule.kind == "linear":
        return 1 - t
    return math.exp(-(schedule.beta_min ** (1 - t)) * schedule.beta_max**t)


def normal(gaussian: Gaussian) -> Normal:
    return Normal(gaussian.mean.double().squeeze(), gaussian.log_std.double().exp().squeeze())


Case = tuple[MaskedDiffusion, list[Reference], Batch]


def case_of(name: str) -> Case:
    model, prompt = build(CONFIGS[name]), PROMPTS.get(name, ())
    length = 2 if name == "point" else LENGTH
    sequences = list(itertools.product(range(SYMBOLS), repeat=length))
    return model, [Reference(model, x, prompt) for x in sequences], batch_of(sequences, COPIES, prompt)


@pytest.fixture(scope="module", params=CONFIGS)
def any_case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture(scope="module", params=TIMELESS)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def test_the_exact_likelihoods_are_distributions(case: Case) -> None:
    model, _, _ = case
    references = [Reference(model, x) for x in SEQUENCES]
    exact = [Reference.exact_fresh, lambda r: r.exact_steps(2), lambda r: r.exact_steps(3)]
    for of in exact if model.latent is None else [*exact, Reference.exact_kept]:
        assert sum(math.exp(-of(r)) for r in references) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("num_latents", [1, 2])
def test_nelbo_and_delbo_have_the_enumerated_expectations(case: Case, num_latents: int) -> None:
    model, references, batch = case
    found_B = nelbo(model, batch, key_of(batch), num_latents=num_latents)
    assert_mean(found_B, [r.nelbo(num_latents) for r in references])
    found_B = delbo(model, batch, key_of(batch), num_latents=num_latents)
    assert_mean(found_B, [r.delbo(num_latents) for r in references])


@pytest.mark.parametrize(("num_steps", "num_latents"), [(1, 1), (2, 2), (3, 1)])
def test_nelbo_steps_has_the_enumerated_expectation(any_case: Case, num_steps: int, num_latents: int) -> None:
    model, references, batch = any_case
    found_B = nelbo_steps(model, batch, key_of(batch), num_steps=num_steps, num_latents=num_latents)
    assert_mean(found_B, [r.nelbo_steps(num_steps, num_latents) for r in references])


@pytest.mark.parametrize("name", ["adaln", "added"])
def test_nelbo_kept_has_the_enumerated_expectation_and_is_never_below_the_truth(name: str) -> None:
    model, references, batch = case_of(name)
    found_B = nelbo_kept(model, batch, key_of(batch))
    assert_mean(found_B, [r.nelbo_kept() for r in references])
    for reference in references:
        assert reference.nelbo_kept() > reference.exact_kept()


def test_more_samples_of_z_tighten_every_bound_which_stays_above_the_truth(case: Case) -> None:
    """0 stands for infinitely many samples."""
    model, references, batch = case
    for reference in references:
        for values in (
            [reference.nelbo(k) for k in (1, 2, 0)] + [reference.exact_fresh()],
            [reference.nelbo_steps(2, k) for k in (1, 2, 0)] + [reference.exact_steps(2)],
            [reference.delbo(k) for k in (1, 2, 0)],
        ):
            assert values == sorted(values, reverse=True)
        assert reference.nelbo_steps(1, 0) == pytest.approx(reference.exact_steps(1), abs=1e-9)
    few = every(batch, 5)
    estimates: list[tuple[Callable[..., Tensor], Callable[[Reference, int], float]]] = [
        (nelbo, lambda r, k: r.nelbo(k)),
        (delbo, lambda r, k: r.delbo(k)),
        (partial(nelbo_steps, num_steps=2), lambda r, k: r.nelbo_steps(2, k)),
    ]
    for estimate, expected in estimates:
        two_B, many_B = (estimate(model, few, key_of(few), num_latents=k) for k in (2, 30))
        limit = float(np.mean([expected(r, 0) for r in references]))
        error = float(many_B.std()) / math.sqrt(len(many_B))
        assert limit - 4 * error < many_B.mean() < limit + 4 * error + 0.06
        assert many_B.mean() <= two_B.mean()


@pytest.mark.parametrize("name", ["adaln", "added"])
def test_one_free_token_has_one_likelihood(name: str) -> None:
    """Every sampler takes it from the same mixture, so with many samples every bound is tight."""
    model, prompt = build(CONFIGS[name]), (0, 2)
    references = [Reference(model, x, prompt) for x in SEQUENCES]
    batch = batch_of(SEQUENCES, 40, prompt)
    exact = torch.tensor([r.exact_fresh() for r in references], dtype=torch.float64).repeat_interleave(40)
    for found_B in (
        nelbo(model, batch, key_of(batch), num_latents=200),
        delbo(model, batch, key_of(batch), num_latents=200),
        nelbo_steps(model, batch, key_of(batch), num_steps=1, num_latents=200),
    ):
        assert (found_B - exact).mean().abs() < 0.01
    assert all(r.nelbo_kept() > r.exact_fresh() == pytest.approx(r.exact_kept()) for r in references)


class Twins(MaskedDiffusion):
    """Two equal, uniform symbols: z says which when both are masked, else the one that is seen; r is the prior."""

    NUM = 4

    @classmethod
    def make(cls) -> "Twins":
        backbone = TransformerConfig(dim=8, num_layers=1, num_heads=2)
        latent = LatentConfig(dim=1, inject="embedding")
        model = cls(ModelConfig(backbone=backbone, vocab_size=cls.NUM + 1, mask_id=cls.NUM, latent=latent))
        with torch.no_grad():
            model.denoiser.head_weight().copy_(torch.eye(cls.NUM + 1, 8))
        return model.eval()

    def hidden(self, batch: Batch, corruption: Corruption, *, latent: Tensor, **other: object) -> Tensor:
        from_z_B = (Normal(0.0, 1.0).cdf(latent[:, 0, 0]) * self.NUM).long().clamp(max=self.NUM - 1)
        seen_B = corruption.x_t_BL.min(1).values
        symbol_B = torch.where(seen_B == self.NUM, from_z_B, seen_B)
        return 14.0 * torch.nn.functional.one_hot(symbol_B, 8)[:, None].expand(-1, 2, -1).float()

    def infer(self, batch: Batch, corruption: Corruption) -> Gaussian:
        return standard_normal(batch.num_sequences, 1, 1, device=batch.tokens_BL.device)


def test_delbo_is_half_of_the_truth_for_two_tied_tokens_where_bounds_are_tight() -> None:
    """docs/errata.md: it charges the pair only with the probability t^2 that both are masked."""
    model, truth = Twins.make(), math.log(Twins.NUM)
    batch = batch_of([(v, v) for v in range(Twins.NUM)], 30)
    found = float(delbo(model, batch, key_of(batch), num_latents=1000).mean())
    assert found == pytest.approx(truth / 2, abs=0.01)
    assert float(nelbo(model, batch, key_of(batch), num_latents=1000).mean()) == pytest.approx(truth, abs=0.02)
    for num_steps in (1, 2):
        found_B = nelbo_steps(model, batch, key_of(batch), num_steps=num_steps, num_latents=1000)
        assert float(found_B.mean()) == pytest.approx(truth, abs=0.02 if num_steps == 1 else 0.2)
    assert float(nelbo_kept(model, batch, key_of(batch)).mean()) > truth
