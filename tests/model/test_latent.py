"""Latents: distributions, pooling, the recognition network, priors, and the losses of VADD Eq. 11 and VMD Eq. 8.

Shapes: B sequences, L positions, S segments, D width, d latent width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from model.batch import Batch
from model.config import LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig, recognition_backbone
from model.corruption import Corruption, MaskSchedule, corrupt
from model.diffusion import MaskedDiffusion, StepSchedule
from model.initialisation import initialise
from model.latent import EarlierBlocksPrior, Gaussian, PartlyMaskedPrior, Pool, Recognition, standard_normal
from model.masks import MaskSpec
from model.noise import NoiseKey
from model.rope import rotary_tables, rotate

Build = Callable[..., MaskedDiffusion]
MakeBatch = Callable[..., Batch]

SYMBOLS, MASK, LENGTH, DIM, LATENT = 12, 12, 8, 16, 5
BACKBONE = TransformerConfig(dim=DIM, num_layers=2, num_heads=2, condition_dim=8)
PRIORS = ("normal", "x_t", "earlier_blocks")


def vadd(*, block_size: int = 0, recognition: dict[str, Any] | None = None, **latent: Any) -> ModelConfig:
    settings = LatentConfig(dim=LATENT, recognition=RecognitionConfig(**(recognition or {})), **latent)
    condition_dim = 8 if settings.inject == "adaln" else 0
    return ModelConfig(
        backbone=replace(BACKBONE, condition_dim=condition_dim),
        vocab_size=SYMBOLS + 1,
        mask_id=MASK,
        block_size=block_size,
        latent=settings,
    )


def with_prior(prior: str, **changes: Any) -> ModelConfig:
    return vadd(prior=prior, block_size=4 if prior == "earlier_blocks" else 0, **changes)


def corrupted(batch: Batch, config: ModelConfig) -> Corruption:
    return corrupt(batch, NoiseKey(0, 0, batch.index_B), config)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(gaussian: Gaussian) -> Normal:
    return Normal(gaussian.mean, gaussian.log_std.exp())


def test_gaussians_are_torch_distributions() -> None:
    one, two = Gaussian(random(7, 3, 4), random(7, 3, 4, seed=1)), Gaussian(random(7, 3, 4, seed=2), random(7, 3, 4))
    z = random(7, 3, 4, seed=3)
    assert torch.allclose(one.kl(two), kl_divergence(normal(one), normal(two)))
    assert torch.allclose(one.log_prob(z), normal(one).log_prob(z).sum(-1))
    assert torch.allclose(one.kl(one), torch.zeros(7, 3, 4, dtype=torch.float64), atol=1e-12)
    unit = standard_normal(7, 3, 4, device=torch.device("cpu"))
    assert torch.allclose(one.kl(unit), kl_divergence(normal(one), Normal(0.0, 1.0)))
    chosen = one.where(z[..., 0] > 0, two)
    for part in ("mean", "log_std"):
        expected = [
            (getattr(one, part) if z[b, s, 0] > 0 else getattr(two, part))[b, s] for b in range(7) for s in range(3)
        ]
        assert torch.equal(getattr(chosen, part).flatten(0, 1), torch.stack(expected))


def test_samples_have_their_moments_and_gradients() -> None:
    mean, log_std = random(4).requires_grad_(), (0.3 * random(4, seed=1)).requires_grad_()
    noise = random(100_000, 4, seed=2)
    z = Gaussian(mean, log_std).sample(noise)
    assert torch.allclose(z.mean(0), mean, atol=0.02)
    assert torch.allclose(z.std(0), log_std.exp(), rtol=0.02)
    z[0].sum().backward()
    assert mean.grad is not None
    assert log_std.grad is not None
    assert torch.equal(mean.grad, torch.ones(4))
    assert torch.allclose(log_std.grad, log_std.exp() * noise[0])


@pytest.mark.parametrize("kind", ["mean", "gated"])
@pytest.mark.parametrize("segments", [1, 2, 8])
@torch.no_grad()
def test_pooling_against_a_loop(kind: str, segments: int) -> None:
    pool, hidden_BLD = Pool(6, kind).double(), random(3, 8, 6)
    keep_BL = random(3, 8, seed=1) > 0
    keep_BL[1] = False
    found = pool(hidden_BLD, keep_BL, segments)
    assert found.shape == (3, segments, 6)
    for b in range(3):
        for s in range(segments):
            places = [i for i in range(8) if i // (8 // segments) == s and keep_BL[b, i]]
            expected = torch.zeros(6, dtype=torch.float64)
            if places and kind == "mean":
                expected = torch.stack([hidden_BLD[b, i] for i in places]).sum(0) / len(places)
            elif places:
                assert pool.score is not None
                scores = [math.exp((hidden_BLD[b, i] @ pool.score.weight[0]).item()) for i in places]
                expected = torch.stack([w * hidden_BLD[b, i] for w, i in zip(scores, places)]).sum(0) / sum(scores)
            assert torch.allclose(found[b, s], expected, atol=1e-6)


def test_a_gated_pool_hears_its_scores() -> None:
    pool, hidden_BLD, keep_BL = Pool(6, "gated").double(), random(1, 8, 6), torch.ones(1, 8, dtype=torch.bool)
    assert pool.score is not None
    with torch.no_grad():
        pool.score.weight.copy_(1000 * hidden_BLD[0, 3][None])
    best = int((hidden_BLD[0] @ hidden_BLD[0, 3]).argmax())
    assert torch.allclose(pool(hidden_BLD, keep_BL, 1)[0, 0], hidden_BLD[0, best])


def plain_recognition(recognition: Recognition, tokens_L: Tensor, masked_L: Tensor) -> Tensor:
    """VADD Section 3.3 for one sequence: shifts and scales from R, multiplied by M; hidden states [L, D]."""
    weights = dict(recognition.trunk.named_parameters())
    vector_C = F.silu(recognition.mark.weight[0])
    x_LD = weights["embed.weight"][tokens_L]
    if recognition.settings.marks == "added":
        x_LD = x_LD + masked_L[:, None] * recognition.mark.weight

    def normed(name: str, x_LD: Tensor, vectors: Tensor) -> Tensor:
        plain_LD = F.layer_norm(x_LD, (DIM,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
        shift, scale = vectors.chunk(2)
        return plain_LD + masked_L[:, None] * (plain_LD * scale + shift)

    def vectors_of(name: str) -> Tensor:
        if recognition.settings.marks == "added":
            return torch.zeros(4 * DIM if name.startswith("blocks") else 2 * DIM, dtype=torch.float64)
        return weights[f"{name}.weight"] @ vector_C + weights[f"{name}.bias"]

    turns = rotary_tables(torch.arange(len(tokens_L))[None], DIM // 2, 10_000.0)
    for layer in range(2):
        prefix = f"blocks.{layer}"
        of_attention, of_ffn = vectors_of(f"{prefix}.modulation").chunk(2)
        inner_LD = normed(f"{prefix}.attention_norm", x_LD, of_attention)
        q, k, v = (
            (inner_LD @ weights[f"{prefix}.attention.{name}.weight"].T).view(1, -1, 2, DIM // 2) for name in "qkv"
        )
        q, k = rotate(q, turns), rotate(k, turns)
        heads = [(q[0, :, h] @ k[0, :, h].T / math.sqrt(DIM // 2)).softmax(-1) @ v[0, :, h] for h in range(2)]
        x_LD = x_LD + torch.cat(heads, -1) @ weights[f"{prefix}.attention.out.weight"].T
        inner_LD = normed(f"{prefix}.ffn_norm", x_LD, of_ffn) @ weights[f"{prefix}.ffn.up.weight"].T
        x_LD = x_LD + F.gelu(inner_LD, approximate="tanh") @ weights[f"{prefix}.ffn.down.weight"].T
    return normed("norm", x_LD, vectors_of("final_modulation"))


@pytest.mark.parametrize("marks", ["adaln", "added"])
@pytest.mark.parametrize("pool_over", ["maskable", "masked"])
@torch.no_grad()
def test_recognition_is_the_papers(marks: str, pool_over: str, build: Build, make_batch: MakeBatch) -> None:
    config = vadd(recognition={"marks": marks, "pool_over": pool_over})
    model, batch = build(config), make_batch(4, LENGTH, SYMBOLS)
    corruption = corrupted(batch, config)
    found = model.infer(batch, corruption)
    assert model.latent is not None
    recognition = model.latent.recognition
    assert isinstance(recognition, Recognition)
    for b in range(4):
        hidden_LD = plain_recognition(recognition, batch.tokens_BL[b], corruption.masked_BL[b])
        kept_LD = hidden_LD[(corruption.masked_BL if pool_over == "masked" else batch.maskable_BL)[b]]
        pooled_D = kept_LD.mean(0) if len(kept_LD) else torch.zeros(DIM, dtype=torch.float64)
        for part in ("mean", "log_std"):
            layer = getattr(recognition.head, part)
            expected = layer.weight @ pooled_D + layer.bias
            assert torch.allclose(getattr(found, part)[b, 0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("marks", ["adaln", "added"])
@torch.no_grad()
def test_marks_matter_and_nothing_else_tells_what_is_masked(marks: str, build: Build, make_batch: MakeBatch) -> None:
    config = vadd(recognition={"marks": marks})
    model, batch = build(config), make_batch(2, LENGTH, SYMBOLS)
    assert model.latent is not None
    few = corrupted(batch, config)
    other_BL = few.masked_BL.clone()
    other_BL[0, int(batch.maskable_BL[0].nonzero()[0])] ^= True
    other = replace(few, masked_BL=other_BL)
    difference = (model.infer(batch, few).mean - model.infer(batch, other).mean).abs().amax((1, 2))
    assert difference[0] > 1e-3
    assert difference[1] == 0
    for name, parameter in model.latent.recognition.named_parameters():
        if "modulation" in name or (marks == "added" and "mark" in name):
            parameter.zero_()
    assert torch.equal(model.infer(batch, few).mean, model.infer(batch, other).mean)


@torch.no_grad()
def test_marks_act_at_masked_positions_only(build: Build, make_batch: MakeBatch) -> None:
    """Without attention between positions, a mark changes its own position alone."""
    config, batch = vadd(), make_batch(3, LENGTH, SYMBOLS)
    model = build(config)
    assert model.latent is not None
    recognition = model.latent.recognition
    assert isinstance(recognition, Recognition)
    for name, parameter in recognition.named_parameters():
        if name.endswith("attention.out.weight"):
            parameter.zero_()
    masked_BL = corrupted(batch, config).masked_BL

    def hidden(applies_BL: Tensor) -> Tensor:
        out: Tensor = recognition.trunk(batch.tokens_BL, condition=recognition.mark.weight, applies=applies_BL)
        return out

    moved_BL = (hidden(masked_BL) - hidden(torch.zeros_like(masked_BL))).abs().amax(-1) > 1e-6
    assert torch.equal(moved_BL, masked_BL)
    before = model.infer(batch, replace(corrupted(batch, config), masked_BL=torch.zeros_like(masked_BL)))
    recognition.mark.weight.mul_(-3)
    after = model.infer(batch, replace(corrupted(batch, config), masked_BL=torch.zeros_like(masked_BL)))
    assert torch.equal(before.mean, after.mean)


def half_hidden(batch: Batch, config: ModelConfig) -> tuple[Batch, Corruption]:
    """Some sequences, or some blocks of them, have nothing masked."""
    maskable_BL = batch.maskable_BL.clone()
    maskable_BL[0, : LENGTH // 2] = False
    maskable_BL[1] = False
    maskable_BL[2, LENGTH // 2 :] = False
    batch = replace(batch, maskable_BL=maskable_BL)
    corruption = corrupted(batch, config)
    expected = corruption.masked_BL.view(batch.num_sequences, corruption.num_segments, -1).any(2)
    assert torch.equal(corruption.hidden_BS, expected)
    assert 0 < int(expected.sum()) < expected.numel()
    return batch, corruption


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("block_size", [0, 4])
@torch.no_grad()
def test_where_nothing_is_masked_z_is_drawn_from_the_prior(
    prior: str, block_size: int, build: Build, make_batch: MakeBatch
) -> None:
    config = with_prior(prior)
    config = replace(config, block_size=config.block_size or block_size)
    model = build(config)
    batch, corruption = half_hidden(make_batch(5, LENGTH, SYMBOLS), config)
    draw, posterior = model.draw_latent(batch, corruption), model.infer(batch, corruption)
    assert model.latent is not None
    segments = corruption.num_segments
    noise_BSd = corruption.key.stream("latent").normal(segments, LATENT)
    for b in range(5):
        for s in range(segments):
            if isinstance(model.latent.prior, EarlierBlocksPrior):
                of_all = model.latent.prior(draw.z_BSd[b : b + 1, :s])
                ahead = Gaussian(of_all.mean[0, s], of_all.log_std[0, s])
            elif prior == "x_t":
                of_all = model.prior_given(batch, corruption)
                ahead = Gaussian(of_all.mean[b, s], of_all.log_std[b, s])
            else:
                ahead = Gaussian(torch.zeros(LATENT), torch.zeros(LATENT))
            own = Gaussian(posterior.mean[b, s], posterior.log_std[b, s])
            used = own if corruption.hidden_BS[b, s] else ahead
            assert torch.allclose(draw.z_BSd[b, s], used.mean + used.log_std.exp() * noise_BSd[b, s], atol=1e-6)
            cost = kl_divergence(normal(own), normal(ahead)).sum() if corruption.hidden_BS[b, s] else torch.zeros(())
            assert draw.kl_BS[b, s].item() == pytest.approx(cost.item(), rel=1e-5)


@torch.no_grad()
def test_a_prior_given_x_t_knows_no_hidden_token(build: Build, make_batch: MakeBatch) -> None:
    config = vadd(prior="x_t", prior_layers=2)
    model, batch = build(config), make_batch(3, LENGTH, SYMBOLS)
    corruption = corrupted(batch, config)
    before = model.prior_given(batch, corruption).mean
    assert isinstance(model.latent.prior, PartlyMaskedPrior)  # type: ignore[union-attr]
    other_BL = torch.where(corruption.masked_BL, (batch.tokens_BL + 1) % SYMBOLS, batch.tokens_BL)
    assert torch.equal(model.prior_given(replace(batch, tokens_BL=other_BL), corruption).mean, before)
    seen = int((~corruption.masked_BL[0]).nonzero()[0])
    x_t_BL = corruption.x_t_BL.clone()
    x_t_BL[0, seen] = (x_t_BL[0, seen] + 1) % SYMBOLS
    moved_B = (model.prior_given(batch, replace(corruption, x_t_BL=x_t_BL)).mean - before).abs().amax((1, 2))
    assert moved_B[0] > 1e-4
    assert not moved_B[1:].any()


@torch.no_grad()
def test_a_prior_given_x_t_sees_its_block_and_earlier_clean_ones(build: Build, make_batch: MakeBatch) -> None:
    """One pass over two streams is one pass per block over [x_0 of earlier blocks | x_t of its own]."""
    config = vadd(prior="x_t", block_size=2)
    model, batch = build(config), make_batch(3, LENGTH, SYMBOLS)
    corruption = corrupted(batch, config)
    assert model.latent is not None
    found = model.prior_given(batch, corruption)
    for block in range(4):
        stop = 2 * block + 2
        x_BL = torch.cat((batch.tokens_BL[:, : stop - 2], corruption.x_t_BL[:, stop - 2 : stop]), 1)
        spec, keep_BL = MaskSpec(block_size=2), batch.maskable_BL[:, :stop]
        alone = model.latent.prior(x_BL, spec, None, keep_BL, block + 1)  # type: ignore[misc]
        assert torch.allclose(found.mean[:, block], alone.mean[:, -1], atol=1e-6)


@torch.no_grad()
def test_a_prior_given_earlier_latents_is_causal(build: Build) -> None:
    model = build(vadd(prior="earlier_blocks", block_size=2, prior_layers=2))
    prior = model.latent.prior  # type: ignore[union-attr]
    assert isinstance(prior, EarlierBlocksPrior)
    z_BSd = random(3, 4, LATENT)
    whole = prior(z_BSd)
    assert whole.mean.shape == whole.log_std.shape == (3, 5, LATENT)
    for s in range(5):
        assert torch.allclose(prior(z_BSd[:, :s]).mean[:, -1], whole.mean[:, s], atol=1e-6)
    changed = z_BSd.clone()
    changed[1, 2] += 1.0
    moved_BS = (prior(changed).mean - whole.mean).abs().amax(2) > 1e-6
    assert torch.equal(moved_BS, torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 5]))


@pytest.mark.parametrize("inject", ["adaln", "embedding"])
@torch.no_grad()
def test_the_denoiser_hears_z_by_the_path_that_was_chosen(inject: str, build: Build, make_batch: MakeBatch) -> None:
    config = vadd(inject=inject)
    model, batch = build(config), make_batch(2, LENGTH, SYMBOLS)
    assert model.latent is not None
    z_BSd, net = random(2, 1, LATENT), model.latent.embedding
    embedded_BSC = F.silu(z_BSd @ net.inner.weight.T + net.inner.bias) @ net.outer.weight.T + net.outer.bias
    found = model.denoise(batch.tokens_BL, latent=z_BSd)
    x_BLD = model.denoiser.embed(batch.tokens_BL)
    if inject == "adaln":
        assert torch.allclose(found, model.denoiser(x_BLD, condition=embedded_BSC))
    else:
        assert torch.allclose(found, model.denoiser(x_BLD + embedded_BSC))
    assert (found - model.denoise(batch.tokens_BL, latent=z_BSd + 1)).abs().max() > 1e-2


def reference(model: MaskedDiffusion, batch: Batch, corruption: Corruption, kl_weight: float) -> Tensor:
    """VMD Eq. 8 with one t per block, block by block (one block: VADD Eq. 11): w(t) (CE + lambda KL), in one stream.

    A block's sequence is the clean blocks before it and its own: x_0 with marks for the encoder, x_t for the decoder.
    """
    config, latent = model.config, model.latent
    assert config.latent is not None
    assert latent is not None
    recognition = latent.recognition
    assert isinstance(recognition, Recognition)
    segments = corruption.num_segments
    size = LENGTH // segments
    noise_BSd = corruption.key.stream("latent").normal(segments, LATENT)
    spec = MaskSpec(block_size=size)
    legal = [v for v in range(SYMBOLS + 1) if v != MASK]
    head_VD = dict(model.named_parameters())["denoiser.head.weight"]
    drawn: list[Tensor] = []
    costs: list[Tensor] = []
    for s in range(segments):
        start, stop = s * size, (s + 1) * size
        tokens_BL, masked_BL = batch.tokens_BL[:, :stop], corruption.masked_BL[:, :stop].clone()
        masked_BL[:, :start] = False
        marked_BLD = recognition.trunk.embed(tokens_BL)
        if recognition.settings.marks == "added":
            marked_BLD = marked_BLD + masked_BL[..., None] * recognition.mark.weight
            hidden_BLD = recognition.trunk(marked_BLD, mask=spec)
        else:
            hidden_BLD = recognition.trunk(marked_BLD, mask=spec, condition=recognition.mark.weight, applies=masked_BL)
        pooled_BSD = recognition.pool(hidden_BLD[:, start:], batch.maskable_BL[:, start:stop], 1)
        head = recognition.head(pooled_BSD[:, 0])
        r = Normal(head.mean, head.log_std.exp())
        if isinstance(latent.prior, EarlierBlocksPrior):
            ahead = latent.prior(torch.stack(drawn, 1) if drawn else noise_BSd[:, :0])
            p = Normal(ahead.mean[:, -1], ahead.log_std[:, -1].exp())
        else:
            p = Normal(torch.zeros_like(r.mean), torch.ones_like(r.mean))
        any_B1 = masked_BL.any(1)[:, None]
        z_Bd = torch.where(any_B1, r.mean + r.stddev * noise_BSd[:, s], p.mean + p.stddev * noise_BSd[:, s])
        drawn.append(z_Bd)
        x_BL = torch.where(masked_BL, MASK, tokens_BL)
        embedded = latent.embedding(torch.stack(drawn, 1).double())
        x_BLD = model.denoiser.embed(x_BL)
        if config.latent.inject == "embedding":
            hidden_BLD = model.denoiser(x_BLD + embedded.repeat_interleave(size, 1), mask=spec)
        else:
            hidden_BLD = model.denoiser(x_BLD, mask=spec, condition=embedded)
        for b in range(len(x_BL)):
            ce = hidden_BLD.new_zeros(())
            for i in masked_BL[b].nonzero().flatten().tolist():
                logits_V = head_VD @ hidden_BLD[b, i]
                ce = ce + logits_V[legal].logsumexp(0) - logits_V[batch.tokens_BL[b, i]]
            kl = kl_divergence(r, p)[b].sum() if any_B1[b] else 0.0
            t = corruption.t_BS[b, s]
            weight = 1.0 if config.loss_weight == "uniform" else MaskSchedule(config.schedule).weight(t)
            costs.append(weight * (ce + kl_weight * kl))
    return torch.stack(costs).sum()


LOSSES = {
    "vadd": vadd(),
    "vadd embedding": vadd(inject="embedding", recognition={"marks": "added", "pool": "gated"}),
    "vadd uniform": replace(vadd(), loss_weight="uniform"),
    "block vmd": vadd(block_size=4, recognition={"pool": "gated", "num_layers": 1}),
    "block vmd small": vadd(block_size=2, inject="embedding", recognition={"marks": "added"}),
    "single tokens": vadd(block_size=1),
    "prior of blocks": vadd(block_size=2, prior="earlier_blocks"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_the_loss_and_its_gradient_are_the_papers(
    name: str, kl_weight: float, build: Build, make_batch: MakeBatch
) -> None:
    config = LOSSES[name]
    model = build(config)
    batch = half_hidden(make_batch(5, LENGTH, SYMBOLS), config)[0]
    corruption = corrupted(batch, config)
    terms = model(batch, corruption, step=StepSchedule(kl_weight=kl_weight))
    expected = reference(model, batch, corruption, kl_weight)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.loss_B.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    model.zero_grad()
    terms.loss.backward(retain_graph=True)
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.backward()
    size = max(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (found[key] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-7 * size, key


def test_the_kl_enters_with_its_weight_alone(build: Build, make_batch: MakeBatch) -> None:
    config = vadd(block_size=4)
    model, batch = build(config), make_batch(4, LENGTH, SYMBOLS)
    corruption = corrupted(batch, config)
    at = {w: model(batch, corruption, step=StepSchedule(kl_weight=w)).loss.item() for w in (0.0, 1.0, 2.5)}
    draw = model.draw_latent(batch, corruption)
    cost = (corruption.weight_BS * draw.kl_BS).sum().item()
    assert cost > 0.1
    assert at[1.0] - at[0.0] == pytest.approx(cost, rel=1e-5)
    assert at[2.5] - at[0.0] == pytest.approx(2.5 * cost, rel=1e-5)


def test_deviations_start_at_one_and_stay_finite() -> None:
    model = MaskedDiffusion(vadd())
    initialise(model, 0, num_layers=2)
    batch_shape = (3, LENGTH)
    tokens_BL, ones_BL = torch.zeros(batch_shape, dtype=torch.int64), torch.ones(batch_shape, dtype=torch.bool)
    recognition = model.latent.recognition  # type: ignore[union-attr]
    t_BS = torch.ones(3, 1)
    gaussian = recognition(tokens_BL, ones_BL, ones_BL, t_BS=t_BS, num_segments=1)
    assert not gaussian.log_std.any()
    assert gaussian.mean.any()
    with torch.no_grad():
        recognition.head.log_std.bias.fill_(1e4)
    wide = recognition(tokens_BL, ones_BL, ones_BL, t_BS=t_BS, num_segments=1)
    assert wide.kl(standard_normal(3, 1, LATENT, device=torch.device("cpu"))).isfinite().all()


def test_the_recognition_network_has_its_own_shape() -> None:
    same = recognition_backbone(vadd())
    assert (same.dim, same.num_layers, same.num_heads) == (DIM, 2, 2)
    assert (same.gates, same.condition_dim) == ("none", 8)
    small = vadd(recognition={"dim": 8, "num_layers": 1, "marks": "added"})
    assert (recognition_backbone(small).dim, recognition_backbone(small).num_heads) == (8, 1)
    assert recognition_backbone(small).condition_dim == 0
    grouped = replace(vadd(), backbone=replace(BACKBONE, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=40))
    kept = recognition_backbone(grouped)
    assert (kept.num_kv_heads, kept.head_dim, kept.ffn_dim) == (2, 6, 40)
    for config in (small, grouped):
        model = MaskedDiffusion(config)
        recognition = model.latent.recognition  # type: ignore[union-attr]
        assert isinstance(recognition, Recognition)
        assert recognition.trunk.config == recognition_backbone(config)
        assert recognition.trunk.head is None
