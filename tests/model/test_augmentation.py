"""Hints: the continuous path by simulation and Bayes' rule, how they reach the network, and what they give away.

Shapes: B sequences, L positions, M rows, D width, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import diffusion
from model.augmentation import Augmentation, Path, loudness, signal_scale
from model.batch import Batch
from model.config import AugmentationConfig, ModelConfig, TransformerConfig
from model.corruption import Corruption, MaskSchedule, corrupt
from model.diffusion import MaskedDiffusion, StepSchedule
from model.initialisation import initialise
from model.noise import NoiseKey

Build = Callable[..., MaskedDiffusion]
MakeBatch = Callable[..., Batch]

SYMBOLS, MASK, LENGTH, DIM = 12, 12, 8, 16
PLAIN = ModelConfig(
    backbone=TransformerConfig(dim=DIM, num_layers=2, num_heads=2), vocab_size=SYMBOLS + 1, mask_id=MASK
)
PATHS = ("flow_matching", "vp")
FUSIONS = ("add", "concat", "reweight", "literal")


def cadd(**settings: object) -> ModelConfig:
    return replace(PLAIN, augmentation=AugmentationConfig(**settings))  # type: ignore[arg-type]


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def a_and_b(kind: str, t: float) -> tuple[float, float]:
    """CADD B.1, and cos^2(pi t / 2) as gbar of the variance-preserving path."""
    if kind == "flow_matching":
        return 1 - t, t
    gbar = math.cos(math.pi * t / 2) ** 2
    return math.sqrt(gbar), math.sqrt(1 - gbar)


@pytest.mark.parametrize("kind", PATHS)
def test_marginals_are_the_papers(kind: str) -> None:
    path = Path(kind)  # type: ignore[arg-type]
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        a, b = a_and_b(kind, t)
        assert path.signal(time(t)).item() == pytest.approx(a, abs=1e-15)
        assert path.noise(time(t)).item() == pytest.approx(b, abs=1e-15)
    assert path.signal(torch.tensor([0.5])).dtype == torch.float64


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.7), (0.5, 0.1), (1.0, 0.4)])
def test_posteriors_are_the_regression_of_an_earlier_state_on_a_later_one(kind: str, t: float, s: float) -> None:
    """z_s is drawn from its marginal, z_t by the step whose composition has the marginal of t."""
    size, z0 = 400_000, 1.7
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, size, generator=generator, dtype=torch.float64)
    (a_t, b_t), (a_s, b_s) = a_and_b(kind, t), a_and_b(kind, s)
    z_s = a_s * z0 + b_s * first
    z_t = a_t / a_s * z_s + math.sqrt(b_t**2 - (a_t / a_s * b_s) ** 2) * second
    assert z_t.mean().item() == pytest.approx(a_t * z0, abs=5 / math.sqrt(size))
    assert z_t.std().item() == pytest.approx(b_t, rel=0.01)
    of_z_t, of_z0, variance = (c.item() for c in Path(kind).posterior(time(t), time(s)))  # type: ignore[arg-type]
    slope = torch.cov(torch.stack((z_t, z_s)))[0, 1].item() / z_t.var().item()
    residual = z_s - of_z_t * z_t - of_z0 * z0
    assert of_z_t == pytest.approx(slope, abs=0.01)
    assert residual.mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(variance / size))
    assert residual.var().item() == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.7), (0.5, 0.1), (0.2, 0.05)])
def test_posteriors_follow_from_bayes_rule_on_a_grid(kind: str, t: float, s: float) -> None:
    z0, z_t = -0.6, 0.9
    (a_t, b_t), (a_s, b_s) = a_and_b(kind, t), a_and_b(kind, s)
    z_s = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    v = b_t**2 - (a_t / a_s * b_s) ** 2
    log = -0.5 * ((z_s - a_s * z0) / b_s) ** 2 - 0.5 * (z_t - a_t / a_s * z_s) ** 2 / v
    weight = log.softmax(0)
    mean = (weight * z_s).sum().item()
    of_z_t, of_z0, variance = (c.item() for c in Path(kind).posterior(time(t), time(s)))  # type: ignore[arg-type]
    assert of_z_t * z_t + of_z0 * z0 == pytest.approx(mean, abs=1e-9)
    assert variance == pytest.approx((weight * (z_s - mean) ** 2).sum().item(), rel=1e-6)


@pytest.mark.parametrize("kind", PATHS)
def test_posteriors_at_the_ends(kind: str) -> None:
    path = Path(kind)  # type: ignore[arg-type]
    for s in (0.2, 0.8):
        a_s, b_s = a_and_b(kind, s)
        from_noise = [c.item() for c in path.posterior(time(1.0), time(s))]
        assert from_noise == pytest.approx([0.0, a_s, b_s**2], abs=1e-12)
        to_clean = [c.item() for c in path.posterior(time(s), time(0.0))]
        assert to_clean == [0.0, 1.0, 0.0]
        nowhere = [c.item() for c in path.posterior(time(s), time(s))]
        assert nowhere == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)


def test_the_posterior_is_equation_17_on_the_variance_preserving_path() -> None:
    t, s = 0.8, 0.45
    gbar_t, gbar_s = (math.cos(math.pi * x / 2) ** 2 for x in (t, s))
    gamma = gbar_t / gbar_s
    expected = [
        math.sqrt(gamma) * (1 - gbar_s) / (1 - gbar_t),
        math.sqrt(gbar_s) * (1 - gamma) / (1 - gbar_t),
        (1 - gbar_s) * (1 - gamma) / (1 - gbar_t),
    ]
    assert [c.item() for c in Path("vp").posterior(time(t), time(s))] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", PATHS)
def test_steps_to_the_true_embedding_keep_the_marginals(kind: str) -> None:
    augmentation = Augmentation(AugmentationConfig(path=kind), 1, 10)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    size, z0 = 200_000, torch.tensor([1.3], dtype=torch.float64)

    def draw() -> Tensor:
        return torch.randn(size, 1, generator=generator, dtype=torch.float64)

    z, times = draw(), [1.0, 0.7, 0.3, 0.05]
    for t, s in itertools.pairwise(times):
        z = augmentation.step(z, z0, time(t), time(s), draw())
        a, b = a_and_b(kind, s)
        direct = augmentation.noisy(z0.expand(size, 1), time(s).expand(size), draw())
        for drawn in (z, direct):
            assert drawn.mean().item() == pytest.approx(a * z0.item(), abs=5 * b / math.sqrt(size))
            assert drawn.std().item() == pytest.approx(b, rel=0.01)
    assert torch.equal(augmentation.step(z, z0, time(0.05), time(0.0), draw()), z0.expand(size, 1))


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("dim", [256, 768])
def test_a_hint_is_read_before_its_half_life_and_lost_after_it(kind: str, dim: int) -> None:
    """Nearest-row decoding, with rows of different norms."""
    size, num = 4000, 2000
    generator = torch.Generator().manual_seed(dim)
    for half_life in (0.4, 0.6):
        config = AugmentationConfig(path=kind, hint_half_life=half_life)  # type: ignore[arg-type]
        augmentation = Augmentation(config, dim, size)
        norms = torch.rand(size, 1, generator=generator) + 0.1
        z0_VD = augmentation.clean(norms * torch.randn(size, dim, generator=generator))
        accuracy = {}
        for shift in (-0.1, 0.0, 0.2):
            noise = torch.randn(num, dim, generator=generator)
            z_t = augmentation.noisy(z0_VD[:num], time(half_life + shift).expand(num), noise)
            guess = torch.cdist(z_t, z0_VD).argmin(1)
            accuracy[shift] = (guess == torch.arange(num)).double().mean().item()
        assert accuracy[-0.1] >= 0.95
        assert 0.4 < accuracy[0.0] < 0.8
        assert accuracy[0.2] <= 0.10


def test_the_scale_is_the_papers_at_its_width() -> None:
    """CADD Table 12 puts the RMS of its rows between 0.10 and 0.17 at 768 dimensions."""
    scale = signal_scale(AugmentationConfig(hint_half_life=0.4), 768, 50_257)
    assert scale == pytest.approx(0.4 / 0.6 * math.sqrt(2 * math.log(50_257) / 768))
    assert scale is not None
    assert 0.10 < scale < 0.17
    vp = signal_scale(AugmentationConfig(path="vp", hint_half_life=0.3), 256, 1000)
    assert vp == pytest.approx(math.tan(0.15 * math.pi) * math.sqrt(2 * math.log(1000) / 256))
    assert signal_scale(AugmentationConfig(scale="literal"), 768, 50_257) is None


def test_the_norm_of_a_row_changes_nothing() -> None:
    augmentation = Augmentation(AugmentationConfig(), 256, 1000)
    rows_MD = torch.randn(5, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    z0_MD = augmentation.clean(rows_MD)
    assert augmentation.scale is not None
    assert z0_MD.square().mean(1).sqrt().tolist() == pytest.approx([augmentation.scale] * 5, rel=1e-9)
    scaled_MD = augmentation.clean(rows_MD * torch.tensor([0.01, 0.5, 1.0, 3.0, 200.0])[:, None])
    assert torch.allclose(scaled_MD, z0_MD, rtol=1e-6)
    (z0_MD * torch.randn(5, 256, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert rows_MD.grad is not None
    assert rows_MD.grad.norm(dim=1).min() > 1e-3
    assert (rows_MD.grad * rows_MD).sum(1).abs().max() < 1e-9 * rows_MD.grad.norm() * rows_MD.norm()
    literal = Augmentation(AugmentationConfig(scale="literal"), 256, 1000)
    assert literal.clean(rows_MD) is rows_MD


def fused(settings: AugmentationConfig, z_t_MD: Tensor, table_VD: Tensor, alpha: float = 0.3) -> Tensor:
    augmentation = Augmentation(settings, table_VD.shape[1], len(table_VD))
    return augmentation.fuse(z_t_MD, table_VD[-1], loudness(table_VD, None), torch.full((len(z_t_MD),), alpha))


def test_a_hint_is_multiplied_by_one_detached_number() -> None:
    generator = torch.Generator().manual_seed(0)
    table_VD = torch.randn(30, 8, generator=generator, dtype=torch.float64).requires_grad_()
    z_t_MD = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    factor = fused(AugmentationConfig(), z_t_MD, table_VD) / z_t_MD
    assert torch.allclose(factor, table_VD.square().mean().sqrt())
    assert not factor.requires_grad
    tripled = fused(AugmentationConfig(), z_t_MD, 3 * table_VD) / z_t_MD
    assert torch.allclose(tripled, 3 * factor)
    reweighted = fused(AugmentationConfig(fusion="reweight"), z_t_MD, table_VD)
    (gradient,) = torch.autograd.grad(reweighted.sum(), table_VD)
    assert gradient[:-1].abs().max() == 0  # through w(mask) alone
    assert torch.equal(fused(AugmentationConfig(scale="literal"), z_t_MD, table_VD), z_t_MD)


def test_the_norm_of_a_hidden_tokens_row_does_not_leak() -> None:
    generator = torch.Generator().manual_seed(0)
    augmentation = Augmentation(AugmentationConfig(), 8, 30)
    table_VD, noise_MD = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (30, 2))
    lengths = []
    for factor in (1.0, 40.0):
        louder_VD = table_VD.clone()
        louder_VD[7] *= factor
        z_t_MD = augmentation.noisy(augmentation.clean(louder_VD[[7, 3]]), torch.tensor([0.5, 0.5]), noise_MD)
        loud = loudness(louder_VD, None)
        lengths.append(augmentation.fuse(z_t_MD, louder_VD[29], loud, torch.tensor([0.5, 0.5])).norm(dim=1))
    assert torch.allclose(lengths[0][0] / lengths[0][1], lengths[1][0] / lengths[1][1], rtol=1e-9)


def inputs_of(model: MaskedDiffusion, run: Callable[[], object]) -> Tensor:
    """The input embeddings that the denoiser is given."""
    seen = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen[0]


def hints_by_hand(model: MaskedDiffusion, corruption: Corruption, batch: Batch) -> Tensor:
    """z_t [B, L, D], position by position; noise is that of each sample and position."""
    assert model.config.augmentation is not None
    config, table_VD = model.config.augmentation, model.denoiser.embed.weight.detach()
    z_t_BLD = torch.zeros(*batch.tokens_BL.shape, DIM, dtype=torch.float64)
    segments = corruption.t_BS.shape[1]
    for b in range(batch.num_sequences):
        for i in range(LENGTH):
            t = corruption.t_BS[b, i * segments // LENGTH].item()
            row_D = table_VD[batch.tokens_BL[b, i]]
            if config.scale == "half_life":
                row_D = row_D / row_D.square().mean().sqrt() * signal_scale(config, DIM, SYMBOLS + 1)  # type: ignore[operator]
            noise_D = NoiseKey(0, 0, batch.index_B[b : b + 1]).stream("hint").fold(i).normal(DIM)[0]
            a, b_t = a_and_b(config.path, t)
            z_t_BLD[b, i] = a * row_D + b_t * noise_D
    return z_t_BLD


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("scale", ["half_life", "literal"])
@pytest.mark.parametrize("block_size", [0, 4])
@torch.no_grad()
def test_what_the_network_is_given(
    fusion: str, kind: str, scale: str, block_size: int, build: Build, make_batch: MakeBatch
) -> None:
    config = replace(cadd(fusion=fusion, path=kind, scale=scale, mse_weight=0.0), block_size=block_size)
    model, batch = build(config), make_batch(3, LENGTH, SYMBOLS)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    whole_BLD = inputs_of(model, lambda: model(batch, corruption, step=StepSchedule()))
    found_BLD, hidden_BL = whole_BLD[:, :LENGTH], corruption.masked_BL
    table_VD = model.denoiser.embed.weight
    clean_BLD = table_VD[batch.tokens_BL] * (2 if fusion == "literal" else 1)
    assert torch.equal(found_BLD[~hidden_BL], clean_BLD[~hidden_BL])
    if block_size:
        assert torch.equal(whole_BLD[:, LENGTH:], clean_BLD)
    loudness = table_VD.square().mean().sqrt() if scale == "half_life" else 1.0
    hint_BLD, mask_D = loudness * hints_by_hand(model, corruption, batch), table_VD[MASK]
    t_BL = corruption.t_BS.repeat_interleave(LENGTH // corruption.num_segments, 1)
    alpha_BL1 = MaskSchedule(config.schedule).alpha(t_BL)[..., None]
    if fusion == "concat":
        assert model.augmentation is not None
        assert model.augmentation.projection is not None
        pairs = torch.cat((mask_D.expand_as(hint_BLD), hint_BLD), -1)
        expected_BLD = pairs @ model.augmentation.projection.weight.T
    elif fusion == "reweight":
        expected_BLD = (1 - alpha_BL1) * mask_D + alpha_BL1 * hint_BLD
    else:
        expected_BLD = mask_D + hint_BLD
    assert torch.allclose(found_BLD[hidden_BL], expected_BLD[hidden_BL], atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_a_sampler_gives_the_network_the_same(fusion: str, build: Build, make_batch: MakeBatch) -> None:
    config = cadd(fusion=fusion)
    model, batch = build(config), make_batch(3, LENGTH, SYMBOLS)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    trained = inputs_of(model, lambda: model(batch, corruption, step=StepSchedule()))
    hint_BLD = hints_by_hand(model, corruption, batch)
    sampled = inputs_of(model, lambda: model.denoise(corruption.x_t_BL, t=corruption.t_BS[:, 0], hint=hint_BLD))
    assert torch.allclose(sampled, trained, atol=1e-6)
    assert torch.equal(sampled[~corruption.masked_BL], trained[~corruption.masked_BL])


@torch.no_grad()
def test_reweighting_leaves_the_mask_alone_at_the_end(build: Build) -> None:
    model = build(cadd(fusion="reweight"))
    x_t, hint = torch.full((2, LENGTH), MASK), torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    found = inputs_of(model, lambda: model.denoise(x_t, t=torch.ones(2), hint=hint))
    assert torch.equal(found, model.denoiser.embed.weight[MASK].expand_as(found))


def started(config: ModelConfig) -> MaskedDiffusion:
    model = MaskedDiffusion(config).double()
    initialise(model, 3, num_layers=2)
    return model


@pytest.mark.parametrize(
    "settings", [{"fusion": "concat"}, {"gated": True}, {"gated": True, "fusion": "reweight", "path": "vp"}], ids=str
)
def test_some_start_equal_to_their_masked_parent_and_learn(settings: dict[str, object], make_batch: MakeBatch) -> None:
    config, batch = cadd(**settings), make_batch(4, LENGTH, SYMBOLS)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    model, parent = started(config), started(PLAIN)
    terms = model(batch, corruption, step=StepSchedule())
    assert terms.loss.item() == parent(batch, corruption, step=StepSchedule()).loss.item()
    terms.loss.backward()
    (own,) = [p for name, p in model.named_parameters() if name.startswith("augmentation.")]
    assert own.grad is not None
    assert own.grad.abs().max() > 0


def test_a_gated_projection_would_never_learn(make_batch: MakeBatch) -> None:
    config, batch = cadd(gated=True, fusion="concat"), make_batch(4, LENGTH, SYMBOLS)
    assert "neither would learn" in next(config.problems())
    model = started(config)
    model(batch, corrupt(batch, NoiseKey(0, 0, batch.index_B), config), step=StepSchedule()).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("augmentation."):
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_gradients_reach_the_rows_of_hidden_tokens(build: Build, make_batch: MakeBatch) -> None:
    """The head is its own here, so only hints can tell the network about tokens that are hidden everywhere."""
    batch = replace(make_batch(4, LENGTH, SYMBOLS), maskable_BL=torch.ones(4, LENGTH, dtype=torch.bool))
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), PLAIN)
    rows = corruption.rows_M[: corruption.num_masked]
    secret = batch.tokens_BL.flatten()[rows[0]]
    tokens_BL = torch.where(corruption.masked_BL, secret, (secret + 1) % SYMBOLS)
    hidden = corrupt(replace(batch, tokens_BL=tokens_BL), NoiseKey(0, 0, batch.index_B), PLAIN)
    for config, heard in ((PLAIN, False), (cadd(), True), (cadd(fusion="reweight"), True)):
        model = build(config)
        model(replace(batch, tokens_BL=tokens_BL), hidden, step=StepSchedule()).loss.backward()
        gradient = model.denoiser.embed.weight.grad
        assert gradient is not None
        assert (gradient[secret].abs().max() > 1e-9) == heard


@pytest.mark.parametrize("z0", ["soft", "hard"])
@pytest.mark.parametrize("scale", ["half_life", "literal"])
@pytest.mark.parametrize("chunk", [1 << 23, 3 * (SYMBOLS + 1)])
def test_the_squared_error_beside_the_cross_entropy(
    z0: str, scale: str, chunk: int, build: Build, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CADD Eq. 21 and Appendix C.3, row by row; values and gradients."""
    monkeypatch.setattr(diffusion, "CHUNK_ELEMENTS", chunk)
    config = cadd(mse_weight=0.7, z0=z0, scale=scale)
    batch, model = make_batch(3, LENGTH, SYMBOLS), build(config)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    whole = model(batch, corruption, step=StepSchedule())
    model.zero_grad()
    whole.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    without = build(replace(config, augmentation=AugmentationConfig(scale=scale)))  # type: ignore[arg-type]
    table_VD = without.denoiser.embed.weight
    rows_VD = table_VD
    if scale == "half_life":
        rows_VD = table_VD / table_VD.square().mean(1, keepdim=True).sqrt()
        rows_VD = rows_VD * signal_scale(AugmentationConfig(), DIM, SYMBOLS + 1)  # type: ignore[operator]
    plain = without(batch, corruption, step=StepSchedule())
    hidden_BLD = without.hidden(batch, corruption, hint=without.draw_hint(corruption))
    total, head_VD = plain.loss, dict(without.named_parameters())["denoiser.head.weight"]
    for b, i in corruption.masked_BL.nonzero().tolist():
        logits_V = head_VD[:SYMBOLS] @ hidden_BLD[b, i]
        p_V = logits_V.softmax(0) if z0 == "soft" else F.one_hot(logits_V.argmax(), SYMBOLS).double()
        error = (p_V @ rows_VD[:SYMBOLS] - rows_VD[batch.tokens_BL[b, i]]).square().sum()
        total = total + 0.7 * error / corruption.t_BS[b, 0]
    assert whole.loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert whole.loss.item() > plain.loss.item() * 1.001
    assert torch.allclose(whole.loss_B, plain.loss_B)
    total.backward()
    for name, parameter in without.named_parameters():
        assert parameter.grad is not None
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
