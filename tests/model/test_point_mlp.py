"""The perceptrons of the 2D toys against plain formulas (VADD B.1, read as in docs/errata.md).

Shapes: B samples, L dimensions, D width, V vocabulary, d latent width.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from model.batch import Batch
from model.config import LatentConfig, ModelConfig, PointMlpConfig, RecognitionConfig
from model.corruption import Corruption, corrupt, corrupt_uniform_count
from model.diffusion import MaskedDiffusion, StepSchedule
from model.latent import SiameseRecognition
from model.layers import TimeEmbedding
from model.noise import NoiseKey
from model.point_mlp import PointMlp

Build = Callable[..., MaskedDiffusion]
MakeBatch = Callable[..., Batch]

SYMBOLS, MASK, DIM, LATENT = 7, 3, 12, 2  # the mask is not the last row here
BACKBONE = PointMlpConfig(dim=DIM, num_layers=3)
PLAIN = ModelConfig(backbone=BACKBONE, vocab_size=SYMBOLS, mask_id=MASK)
TIMED = replace(PLAIN, time_conditioning=True)
VADD = replace(TIMED, latent=LatentConfig(dim=LATENT, inject="embedding"))
CONFIGS = {
    "plain": PLAIN,
    "timed": TIMED,
    "three": replace(TIMED, backbone=replace(BACKBONE, num_dimensions=3)),
}


def corrupted(batch: Batch, config: ModelConfig) -> Corruption:
    return corrupt(batch, NoiseKey(0, 0, batch.index_B), config)


def points(make_batch: MakeBatch, count: int = 9, length: int = 2) -> Batch:
    batch = make_batch(count, length, SYMBOLS - 1, maskable=1.1)
    return replace(batch, tokens_BL=batch.tokens_BL + (batch.tokens_BL >= MASK))


def perceptron(weights: Mapping[str, Tensor], x_D: Tensor, num_layers: int) -> Tensor:
    for layer in range(num_layers):
        x_D = F.elu(weights[f"layers.layers.{layer}.weight"] @ x_D + weights[f"layers.layers.{layer}.bias"])
    return x_D


def time_vector(module: TimeEmbedding, t: Tensor) -> Tensor:
    vector: Tensor = module(t.reshape(1, 1))[0, 0]
    return vector


def summed(weights: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    """One table per dimension, embeddings summed."""
    tables = weights["embed.weight"].view(len(tokens), SYMBOLS, DIM)
    return torch.stack([tables[i, token] for i, token in enumerate(tokens)]).sum(0)


def logits_by_hand(model: MaskedDiffusion, x_t: list[int], t: Tensor, z_d: Tensor | None = None) -> Tensor:
    """[L, V]: hidden layers over emb(x) + emb(t) + emb(z), and an output layer for each dimension."""
    weights = dict(model.denoiser.named_parameters())
    x_D = summed(weights, x_t)
    if isinstance(model.denoiser, PointMlp) and model.denoiser.time is not None:
        x_D = x_D + time_vector(model.denoiser.time, t)
    if z_d is not None:
        assert model.latent is not None
        x_D = x_D + len(x_t) * model.latent.embedding(z_d.double())
    hidden_D = perceptron(weights, x_D, 3)
    outputs = weights["head.weight"].view(len(x_t), SYMBOLS, DIM), weights["head.bias"].view(len(x_t), SYMBOLS)
    return torch.stack([outputs[0][i] @ hidden_D + outputs[1][i] for i in range(len(x_t))])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_the_formulas(name: str, build: Build, make_batch: MakeBatch) -> None:
    config = CONFIGS[name]
    assert isinstance(config.backbone, PointMlpConfig)
    length = config.backbone.num_dimensions
    model, batch = build(config), points(make_batch, length=length)
    x_t_BL, t_B = corrupted(batch, config).x_t_BL, torch.linspace(0.1, 0.9, 9)
    hidden_BLD = model.denoise(x_t_BL, t=t_B)
    found = model.logits(hidden_BLD.flatten(0, 1), torch.arange(9 * length)).view(9, length, SYMBOLS)
    for b in range(9):
        expected = logits_by_hand(model, x_t_BL[b].tolist(), t_B[b])
        expected[:, MASK] = -torch.inf
        assert torch.allclose(found[b].double(), expected, atol=1e-5)


def legal_nats(logits_V: Tensor, target: Tensor) -> Tensor:
    legal = [v for v in range(SYMBOLS) if v != MASK]
    return logits_V[legal].logsumexp(0) - logits_V[target]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_its_gradient_are_a_plain_reference(name: str, build: Build, make_batch: MakeBatch) -> None:
    config = CONFIGS[name]
    assert isinstance(config.backbone, PointMlpConfig)
    model, batch = build(config), points(make_batch, length=config.backbone.num_dimensions)
    corruption = corrupted(batch, config)
    terms = model(batch, corruption, step=StepSchedule())
    loss, total = torch.zeros(()), 0.0
    for b, i in corruption.masked_BL.nonzero().tolist():
        t = corruption.t_BS[b, 0]
        nats = legal_nats(logits_by_hand(model, corruption.x_t_BL[b].tolist(), t)[i], batch.tokens_BL[b, i])
        loss, total = loss + nats / t, total + nats.item()
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms.cross_entropy.item() == pytest.approx(total, rel=1e-5)
    model.zero_grad()
    terms.loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss.backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert (one - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


@torch.no_grad()
def test_each_dimension_hears_the_other(build: Build) -> None:
    """Which is what the network as printed could not."""
    model = build(PLAIN)
    x_t = torch.tensor([[MASK, 0], [MASK, 1], [0, MASK], [1, MASK]])
    hidden_BLD = model.denoise(x_t)
    rows = torch.tensor([0, 2, 5, 7])
    log_probs = model.logits(hidden_BLD.flatten(0, 1)[rows], rows).log_softmax(1).exp()
    assert (log_probs[0] - log_probs[1]).abs().max() > 1e-3
    assert (log_probs[2] - log_probs[3]).abs().max() > 1e-3
    both = model.denoise(torch.tensor([[MASK, MASK]]))[0]
    apart = model.logits(both, torch.tensor([0, 1])).softmax(1)
    assert (apart[0] - apart[1]).abs().max() > 1e-3


@torch.no_grad()
def test_one_dimension_at_a_time_is_a_distribution(build: Build) -> None:
    model = build(PLAIN)
    legal = [v for v in range(SYMBOLS) if v != MASK]
    for first in (0, 1):
        total = 0.0
        for x in itertools.product(legal, repeat=2):
            seen = [x[i] if i == first else MASK for i in range(2)]
            one = logits_by_hand(model, [MASK, MASK], torch.ones(()))[first][legal].log_softmax(0)
            two = logits_by_hand(model, seen, torch.ones(()))[1 - first][legal].log_softmax(0)
            total += (one[legal.index(x[first])] + two[legal.index(x[1 - first])]).exp().item()
        assert total == pytest.approx(1.0, abs=1e-9)


def posterior_by_hand(model: MaskedDiffusion, x_0: list[int], x_t: list[int], t: Tensor) -> Normal:
    """The same perceptron reads x_0 and x_t, each with t; their average goes through a last layer."""
    assert model.latent is not None
    recognition = model.latent.recognition
    assert isinstance(recognition, SiameseRecognition)
    weights = dict(recognition.mlp.named_parameters())
    when_D = time_vector(recognition.mlp.time, t)
    both = [perceptron(weights, summed(weights, tokens) + when_D, 3) for tokens in (x_0, x_t)]
    hidden_D = F.elu(weights["join.weight"] @ ((both[0] + both[1]) / 2) + weights["join.bias"])
    head = recognition.head
    mean, log_std = (layer.weight @ hidden_D + layer.bias for layer in (head.mean, head.log_std))
    return Normal(mean, log_std.exp())


def test_vadds_loss_is_the_papers(build: Build, make_batch: MakeBatch) -> None:
    """Eq. 11, point by point; where nothing is masked z comes from the prior and costs nothing."""
    model, batch = build(VADD), points(make_batch, 12)
    corruption = corrupted(batch, VADD)
    assert not corruption.masked_BL.any(1).all()
    noise_BSd = corruption.key.stream("latent").normal(1, LATENT)
    loss = torch.zeros(())
    for b in range(12):
        t, x_0, x_t = corruption.t_BS[b, 0], batch.tokens_BL[b].tolist(), corruption.x_t_BL[b].tolist()
        if not corruption.masked_BL[b].any():
            continue
        r = posterior_by_hand(model, x_0, x_t, t)
        logits_LV = logits_by_hand(model, x_t, t, r.mean + r.stddev * noise_BSd[b, 0])
        nats = [legal_nats(logits_LV[i], batch.tokens_BL[b, i]) for i in range(2) if corruption.masked_BL[b, i]]
        loss = loss + (sum(nats) + 0.6 * kl_divergence(r, Normal(0.0, 1.0)).sum()) / t
    terms = model(batch, corruption, step=StepSchedule(kl_weight=0.6))
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    draw = model.draw_latent(batch, corruption)
    for b in (~corruption.masked_BL.any(1)).nonzero().flatten().tolist():
        assert torch.equal(draw.z_BSd[b], noise_BSd[b])
        assert draw.kl_BS[b, 0] == 0


@torch.no_grad()
def test_recognition_hears_what_is_masked(build: Build, make_batch: MakeBatch) -> None:
    model, batch = build(VADD), points(make_batch, 3)
    corruption = corrupted(batch, VADD)
    flipped = replace(corruption, masked_BL=~corruption.masked_BL)
    assert ((model.infer(batch, flipped).mean - model.infer(batch, corruption).mean).abs().amax(2) > 1e-3).all()


def test_padding_rows_cost_nothing_whatever_they_hold(build: Build, make_batch: MakeBatch) -> None:
    model, batch = build(PLAIN), points(make_batch, 3)
    corruption = corrupt_uniform_count(batch, NoiseKey(0, 0, batch.index_B), PLAIN)
    terms = model(batch, corruption, step=StepSchedule())
    targets_M = corruption.targets_M.clone()
    targets_M[corruption.num_masked :] = MASK
    same = model(batch, replace(corruption, targets_M=targets_M), step=StepSchedule())
    assert same.loss.item() == terms.loss.item()
    same.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_recognition_network_has_its_own_shape() -> None:
    recognition = RecognitionConfig(dim=5, num_layers=1)
    config = replace(VADD, latent=replace(VADD.latent, recognition=recognition))  # type: ignore[type-var]
    latent = MaskedDiffusion(config).latent
    assert latent is not None
    assert isinstance(latent.recognition, SiameseRecognition)
    assert latent.recognition.mlp.dim == 5
    assert len(latent.recognition.mlp.layers.layers) == 1
