"""The bound of models with hints (CADD Eq. 18-19, 24) by quadrature over hints of width 2.

The references know the model as a sampler does: `denoise`, the clean embedding of a token, and the two paths written
out anew.

Shapes: N nodes of a quadrature, L positions, D width, V symbols, H hints.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from eval.sampling.amount import Ancestral
from eval.sampling.hints import HintPolicy
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.batch import Batch
from model.bounds import nll_discrete
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from model.noise import NoiseKey
from model.step_bound import nelbo_steps

SYMBOLS, MASK, DIM = 3, 3, 2
BACKBONE = TransformerConfig(
    dim=DIM, num_layers=1, num_heads=1, ffn_dim=8, norm="rmsnorm", norm_eps=1.0, max_positions=2
)
HINTED = ModelConfig(
    backbone=BACKBONE,
    vocab_size=SYMBOLS + 1,
    mask_id=MASK,
    augmentation=AugmentationConfig(scale="literal"),
)
PATHS = {
    "flow_matching": HINTED,
    "vp": replace(HINTED, augmentation=AugmentationConfig(path="vp", hint_half_life=0.6)),
}
TIED = replace(
    HINTED,
    backbone=replace(BACKBONE, condition_dim=4),
    latent=LatentConfig(dim=1, recognition=RecognitionConfig(num_layers=1)),
)
COPIES = 4000
Z0 = Literal["soft", "hard"]


def build(config: ModelConfig) -> MaskedDiffusion:
    """Random weights, large enough that hints matter; the norms are soft, so that functions are smooth."""
    model = MaskedDiffusion(config)
    initialise(model, 0, num_layers=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
            if "latent" in name and "head" in name:
                parameter.mul_(0.3)
            if "latent.embedding" in name:
                parameter.mul_(3.0)
    return model.eval()


def batch_of(x: Sequence[int], copies: int) -> Batch:
    tokens_BL = torch.tensor([x]).repeat(copies, 1)
    maskable_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    return Batch(tokens_BL, maskable_BL, torch.arange(len(x)).expand_as(tokens_BL), torch.arange(copies))


def key_of(batch: Batch) -> NoiseKey:
    return NoiseKey(0, 0, batch.index_B)


def path_of(model: MaskedDiffusion, t: float) -> tuple[float, float]:
    """a(t) and b(t)."""
    assert model.config.augmentation is not None
    if model.config.augmentation.path == "vp":
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    return 1 - t, t


def gauss_hermite(dims: int, num: int) -> tuple[Tensor, Tensor]:
    """Nodes [N, dims] and weights [N] of a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(num)
    nodes = torch.tensor(list(itertools.product(x, repeat=dims)))
    weights = torch.tensor([math.prod(ws) for ws in itertools.product(w / w.sum(), repeat=dims)])
    return nodes, weights


def uniform_grid(num: int) -> tuple[Tensor, Tensor]:
    """The same in two dimensions on a fine grid, for functions that jump."""
    x = torch.linspace(-5.0, 5.0, num, dtype=torch.float64)
    nodes = torch.cartesian_prod(x, x)
    weights = (-0.5 * nodes.square().sum(1)).exp()
    return nodes, weights / weights.sum()


def posterior_of(model: MaskedDiffusion, t: float, s: float) -> tuple[float, float]:
    """Weight of z0 in the mean of q(z_s | z_t, z0), and its variance: Bayes with q(z_t | z_s) and q(z_s | z0)."""
    (a_t, b_t), (a_s, b_s) = path_of(model, t), path_of(model, s)
    slope = a_t / a_s
    variance = 1.0 / (1.0 / b_s**2 + slope**2 / (b_t**2 - slope**2 * b_s**2))
    return variance * a_s / b_s**2, variance


def embeddings(model: MaskedDiffusion) -> Tensor:
    """z0 of every symbol [V, D]."""
    assert model.augmentation is not None
    return model.augmentation.clean(model.denoiser.embed.weight[:SYMBOLS]).detach().double()


@torch.no_grad()
def predict(model: MaskedDiffusion, x_t: Sequence[int], t: float, hints: Tensor, z_N: Tensor | None = None) -> Tensor:
    """Log of the mean over hints [N, H, L, D] of the predictions, [N, L, V]."""
    num, num_hints = hints.shape[:2]
    rows = num * num_hints
    latent = None if z_N is None else z_N.repeat_interleave(num_hints)[:, None, None].float()
    hidden = model.denoise(
        torch.tensor([x_t]).expand(rows, -1), t=torch.full((rows,), t), hint=hints.flatten(0, 1).float(), latent=latent
    )
    log_probs = model.logits(hidden.flatten(0, 1)).double().log_softmax(1)[:, :SYMBOLS]
    return log_probs.view(num, num_hints, len(x_t), SYMBOLS).logsumexp(1) - math.log(num_hints)


def estimate_of(model: MaskedDiffusion, log_pi: Tensor, z0: str) -> Tensor:
    """z0_hat [..., D] (CADD Eq. 21)."""
    table = embeddings(model)
    return log_pi.exp() @ table if z0 == "soft" else table[log_pi.argmax(-1)]


def noisy(model: MaskedDiffusion, x: Sequence[int], masked: Sequence[int], t: float, nodes: Tensor) -> Tensor:
    """Hints [N, H, L, D] at the nodes [N, H, n, D] of the noise."""
    a, b = path_of(model, t)
    hints = torch.zeros(*nodes.shape[:2], len(x), DIM, dtype=torch.float64)
    hints[:, :, list(masked)] = a * embeddings(model)[[x[i] for i in masked]] + b * nodes
    return hints


def bound(model: MaskedDiffusion, x: Sequence[int], num_steps: int, num_hints: int, z0: Z0, *, given: int = 0) -> float:
    """The sum over the grid of rho_flip CE + rho_keep H KL_cont, in expectation, of the tokens after those given."""
    total, free = 0.0, range(given, len(x))
    for step in range(num_steps):
        t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
        flip = (t - s) / t
        for n in range(1, len(free) + 1):
            for masked in itertools.combinations(free, n):
                dims = num_hints * n * DIM
                nodes, weights = uniform_grid(101) if z0 == "hard" else gauss_hermite(dims, 10 if dims < 3 else 7)
                x_t = [MASK if i in masked else v for i, v in enumerate(x)]
                hints = noisy(model, x, masked, t, nodes.view(-1, num_hints, n, DIM))
                log_pi = predict(model, x_t, t, hints)
                costs = -flip * sum(log_pi[:, i, x[i]] for i in masked)
                if s > 0:
                    of_z0, variance = posterior_of(model, t, s)
                    error = embeddings(model)[list(x)] - estimate_of(model, log_pi, z0)
                    squared = error[:, list(masked)].square().sum((1, 2))
                    costs = costs + (1 - flip) * num_hints * of_z0**2 * squared / (2 * variance)
                total += t**n * (1 - t) ** (len(free) - n) * float(weights @ costs)
    return total


def exact_one_step(model: MaskedDiffusion, x: Sequence[int]) -> float:
    nodes, weights = gauss_hermite(len(x) * DIM, 8)
    log_pi = predict(model, [MASK] * len(x), 1.0, nodes.view(-1, 1, len(x), DIM))
    return -math.log(float(weights @ sum(log_pi[:, i, v] for i, v in enumerate(x)).exp()))


def exact_two_steps(model: MaskedDiffusion, symbol: int, z0: Z0) -> float:
    """-log p of one token: revealed at t = 1, or at t = 1/2 from a hint that the first prediction has moved."""
    nodes, weights = uniform_grid(101) if z0 == "hard" else gauss_hermite(DIM, 16)
    log_pi = predict(model, [MASK], 1.0, nodes.view(-1, 1, 1, DIM))[:, 0]
    later, later_weights = gauss_hermite(DIM, 16)
    a_s, b_s = path_of(model, 0.5)
    means, which = estimate_of(model, log_pi, z0).unique(dim=0, return_inverse=True)
    hints = (a_s * means[:, None] + b_s * later).view(-1, 1, 1, DIM)
    moved = predict(model, [MASK], 0.5, hints)[:, 0, symbol].exp().view(len(means), -1) @ later_weights
    return -math.log(float(weights @ (0.5 * log_pi[:, symbol].exp() + 0.5 * moved[which])))


def assert_mean(found_B: Tensor, expected: float) -> None:
    error = float(found_B.std()) / math.sqrt(len(found_B)) + 1e-5
    assert abs(float(found_B.mean()) - expected) < 5 * error
    assert error < 0.04 * max(1.0, expected)


@pytest.fixture(scope="module", params=PATHS)
def model(request: pytest.FixtureRequest) -> MaskedDiffusion:
    return build(PATHS[request.param])


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize(("x", "num_hints", "z0"), [((0,), 1, "hard"), ((1, 2), 1, "soft"), ((2,), 2, "soft")])
def test_nelbo_steps_is_what_quadrature_says(
    model: MaskedDiffusion, x: tuple[int, ...], num_hints: int, z0: Z0, num_steps: int
) -> None:
    batch = batch_of(x, COPIES)
    found_B = nelbo_steps(model, batch, key_of(batch), num_steps=num_steps, num_hints=num_hints, z0=z0)
    assert_mean(found_B, bound(model, x, num_steps, num_hints, z0))


@pytest.mark.parametrize("fusion", ["add", "literal", "reweight", "concat"])
def test_with_blocks_it_is_the_sum_over_blocks(fusion: Literal["add", "literal", "reweight", "concat"]) -> None:
    model = build(replace(HINTED, block_size=1, augmentation=AugmentationConfig(fusion=fusion)))
    batch = batch_of((1, 2), COPIES)
    found_B = nelbo_steps(model, batch, key_of(batch), num_steps=2, z0="soft")
    assert_mean(found_B, bound(model, (1,), 2, 1, "soft") + bound(model, (1, 2), 2, 1, "soft", given=1))


def test_nelbo_steps_is_never_below_the_truth(model: MaskedDiffusion) -> None:
    pairs = list(itertools.product(range(SYMBOLS), repeat=2))
    assert sum(math.exp(-exact_one_step(model, x)) for x in pairs) == pytest.approx(1.0, abs=1e-4)
    for x in pairs:
        assert bound(model, x, 1, 1, "soft") > exact_one_step(model, x)
    for z0 in get_args(Z0):
        exact = [exact_two_steps(model, symbol, z0) for symbol in range(SYMBOLS)]
        assert sum(math.exp(-nats) for nats in exact) == pytest.approx(1.0, abs=1e-4)
        for symbol, truth in enumerate(exact):
            assert bound(model, (symbol,), 2, 1, z0) > truth


@pytest.mark.parametrize("z0", get_args(Z0))
def test_the_sampler_in_two_steps_follows_the_exact_law(model: MaskedDiffusion, z0: Z0) -> None:
    number = 60_000
    tokens_BL = torch.full((number, 1), MASK)
    state = SamplerState.start(tokens_BL, tokens_BL == MASK, mask_id=MASK, seed=1)
    policies = Policies(Ancestral(model.config.schedule), "random", hints=HintPolicy(1, z0))
    counts = sample(model, state, policies, 2).tokens_BL.flatten().bincount(minlength=SYMBOLS).double()
    expected = number * torch.tensor([math.exp(-exact_two_steps(model, symbol, z0)) for symbol in range(SYMBOLS)])
    assert float(((counts[:SYMBOLS] - expected).square() / expected).sum()) < 14.0  # two degrees: 1 in 1,100


def test_the_discrete_part_can_be_below_the_truth() -> None:
    """A network that reads the token off its hint pays nothing for it: the hint held x0."""
    model = build(HINTED)
    with torch.no_grad():
        table = model.denoiser.embed.weight
        table.copy_(torch.tensor([[30.0, 0.0], [-15.0, 26.0], [-15.0, -26.0], [0.0, 0.0]]))
        for parameter in model.denoiser.blocks.parameters():
            parameter.zero_()
        model.denoiser.place.weight.zero_()
        model.denoiser.norm.weight.fill_(1.0)
        model.denoiser.head.weight.copy_(table)
    batch = batch_of((0, 1), COPIES)
    truth = exact_one_step(model, (0, 1))
    found_B = nll_discrete(model, batch, key_of(batch))
    assert float(found_B.mean()) < 0.5 * truth
    for num_steps in (1, 2, 4):
        assert float(nelbo_steps(model, batch, key_of(batch), num_steps=num_steps).mean()) > 0.9 * 2 * math.log(3)


@torch.no_grad()
def posterior(model: MaskedDiffusion, symbol: int) -> Normal:
    assert model.latent is not None
    ones = torch.ones(1, 1, dtype=torch.bool)
    r = model.latent.recognition(torch.tensor([[symbol]]), ones, ones, t_BS=torch.ones(1, 1), num_segments=1)
    return Normal(r.mean.double().squeeze(), r.log_std.double().exp().squeeze())


Z_G = torch.linspace(-7.0, 7.0, 57, dtype=torch.float64)
Z_WEIGHT_G = (-0.5 * Z_G.square()).exp() / (-0.5 * Z_G.square()).exp().sum()


def with_z(model: MaskedDiffusion, t: float, hints: Tensor) -> Tensor:
    """Log-predictions [N, G, V] of one token for all hints [N, H, 1, D] and every z."""
    rows = hints.repeat_interleave(len(Z_G), 0)
    return predict(model, [MASK], t, rows, Z_G.repeat(len(hints))).view(len(hints), len(Z_G), SYMBOLS)


@pytest.mark.parametrize(("symbol", "num_hints"), [(0, 1), (1, 2), (2, 1)])
def test_a_latent_joins_in(symbol: int, num_hints: int) -> None:
    """One token in two steps: one sample of z, or as good as infinitely many, against quadrature over hints and z."""
    model, batch = build(TIED), batch_of((symbol,), COPIES)
    r = posterior(model, symbol)
    r_G = r.log_prob(Z_G).exp() * (Z_G[1] - Z_G[0])
    nodes, weights = gauss_hermite(num_hints * DIM, 10 if num_hints == 1 else 6)
    noise = nodes.view(-1, num_hints, 1, DIM)
    first = with_z(model, 1.0, noise)
    second = with_z(model, 0.5, noisy(model, (symbol,), (0,), 0.5, noise))
    of_z0, variance = posterior_of(model, 1.0, 0.5)
    shift = of_z0 / math.sqrt(variance) * (embeddings(model)[symbol] - estimate_of(model, first, "soft"))
    kl = 1.5 * float(kl_divergence(r, Normal(0.0, 1.0)))
    stays = 0.5 * num_hints * shift.square().sum(-1)
    one = float(weights @ (0.5 * stays - 0.5 * first[..., symbol] - 0.5 * second[..., symbol]) @ r_G)
    key, options = key_of(batch), {"num_steps": 2, "num_hints": num_hints}
    found_B = nelbo_steps(model, batch, key, z0="soft", **options)
    assert_mean(found_B, one + kl)
    said = [float(weights @ p[..., symbol].exp() @ Z_WEIGHT_G) for p in (first, second)]
    assert_mean((-found_B / 2).exp(), 0.25 * (sum(said) + 2.0))  # ratios of densities that stay silent average to 1
    drawn, drawn_weights = gauss_hermite(num_hints * DIM, 10 if num_hints == 1 else 4)
    log_ratio = -stays[:, None] - torch.einsum("ngd,mhd->nmg", shift, drawn.view(-1, num_hints, DIM))
    mixed = -(log_ratio.exp() @ Z_WEIGHT_G).log() @ drawn_weights
    spoken = [-(p[..., symbol].exp() @ Z_WEIGHT_G).log() for p in (first, second)]
    many = float(weights @ (0.5 * mixed + 0.5 * spoken[0] + 0.5 * spoken[1]))
    found_B = nelbo_steps(model, batch.rows(0, 1500), key.rows(0, 1500), num_latents=40, z0="soft", **options)
    error = float(found_B.std()) / math.sqrt(len(found_B))
    assert many - 4 * error < float(found_B.mean()) < many + 4 * error + 0.05
    assert many < one + kl


def test_with_a_latent_the_bound_is_never_below_the_truth() -> None:
    model = build(TIED)
    nodes, weights = uniform_grid(41)
    later, later_weights = gauss_hermite(DIM, 12)
    a_s, b_s = path_of(model, 0.5)
    first, total = with_z(model, 1.0, nodes.view(-1, 1, 1, DIM)), 0.0
    ahead = [with_z(model, 0.5, (a_s * z0 + b_s * later).view(-1, 1, 1, DIM)) for z0 in embeddings(model)]
    moved = [(log_probs.exp() * Z_WEIGHT_G[:, None]).sum(1) for log_probs in ahead]
    for symbol in range(SYMBOLS):
        of_estimate = torch.stack([later_weights @ p[:, symbol] for p in moved])
        both = 0.5 * first[..., symbol].exp() + 0.5 * of_estimate[first.argmax(-1)]
        probability = float(weights @ both @ Z_WEIGHT_G)
        total += probability
        batch = batch_of((symbol,), 1000)
        found_B = nelbo_steps(model, batch, key_of(batch), num_steps=2, num_latents=30)
        assert float(found_B.mean()) > -math.log(probability)
    assert total == pytest.approx(1.0, abs=1e-4)
