"""Blocks and the autoregressive baseline: every arrow by perturbation, the ends of the scale, exact likelihoods.

Shapes: B sequences, L positions, S blocks, D width, d latent width.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import KVCache
from model.batch import Batch
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.corruption import Corruption, corrupt, corrupt_uniform_count, shift_right
from model.diffusion import MaskedDiffusion, StepSchedule
from model.noise import NoiseKey

Build = Callable[..., MaskedDiffusion]
MakeBatch = Callable[..., Batch]

SYMBOLS, MASK, LENGTH, DIM, LATENT = 12, 12, 12, 16, 5
BACKBONE = TransformerConfig(dim=DIM, num_layers=2, num_heads=2)
PLAIN = ModelConfig(backbone=BACKBONE, vocab_size=SYMBOLS + 1, mask_id=MASK)
CONDITIONED = replace(PLAIN, backbone=replace(BACKBONE, condition_dim=8))
SIZE, BLOCKS = 3, 4
LATENTS: dict[str, Any] = {
    "adaln": replace(CONDITIONED, latent=LatentConfig(dim=LATENT)),
    "embedding, added marks": replace(
        PLAIN,
        latent=LatentConfig(dim=LATENT, inject="embedding", recognition=RecognitionConfig(marks="added", pool="gated")),
    ),
}


def corrupted(batch: Batch, config: ModelConfig) -> Corruption:
    return corrupt(batch, NoiseKey(0, 0, batch.index_B), config)


def moved(after: Tensor, before: Tensor) -> list[bool]:
    """Which blocks (dimension 1 of [1, S or L, ...]) of the only sequence changed."""
    change_S = (after - before).abs().flatten(2).amax(2)[0].unflatten(0, (BLOCKS, -1)).amax(1)
    assert all(value == 0.0 or value > 1e-6 for value in change_S.tolist())
    return [bool(value) for value in change_S]


def only_from(block: int) -> list[bool]:
    return [other >= block for other in range(BLOCKS)]


def only_after(block: int) -> list[bool]:
    return only_from(block + 1)


def only(block: int) -> list[bool]:
    return [other == block for other in range(BLOCKS)]


def other_token(tokens_BL: Tensor, place: int) -> Tensor:
    changed = tokens_BL.clone()
    changed[0, place] = (changed[0, place] + 1) % SYMBOLS
    return changed


@pytest.fixture
def row(make_batch: MakeBatch) -> Batch:
    return make_batch(1, LENGTH, SYMBOLS, maskable=1.1)


@pytest.mark.parametrize("name", LATENTS)
@torch.no_grad()
def test_the_recognition_network_sees_x_0_so_far_and_the_marks_of_its_block(
    name: str, build: Build, row: Batch
) -> None:
    """z^b hears x_0 of its own and earlier blocks, and M of its own block."""
    config = replace(LATENTS[name], block_size=SIZE)
    model, corruption = build(config), corrupted(row, config)
    before = model.infer(row, corruption).mean
    for place in range(LENGTH):
        tokens = replace(row, tokens_BL=other_token(row.tokens_BL, place))
        assert moved(model.infer(tokens, corruption).mean, before) == only_from(place // SIZE)
        masked_BL = corruption.masked_BL.clone()
        masked_BL[0, place] ^= True
        marks = replace(corruption, masked_BL=masked_BL)
        assert moved(model.infer(row, marks).mean, before) == only(place // SIZE)


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("timed", [False, True])
@torch.no_grad()
def test_the_decoder_sees_its_x_t_its_z_and_clean_blocks_before(
    name: str, timed: bool, build: Build, row: Batch
) -> None:
    """Block b hears x_t^b, z^b, t^b, and x_0 and z of earlier blocks; never x_0^b, x_t of others, or what follows."""
    config = replace(LATENTS[name], block_size=SIZE)
    if timed:
        config = replace(config, time_conditioning=True, backbone=CONDITIONED.backbone)
        if name != "adaln":
            config = replace(config, latent=replace(config.latent, inject="embedding"))
    model, corruption = build(config), corrupted(row, config)
    z_BSd = torch.randn(1, BLOCKS, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model.hidden(row, corruption, latent=z_BSd)
    for place in range(LENGTH):
        clean = replace(row, tokens_BL=other_token(row.tokens_BL, place))
        assert moved(model.hidden(clean, corruption, latent=z_BSd), before) == only_after(place // SIZE)
        noisy = replace(corruption, x_t_BL=other_token(corruption.x_t_BL, place))
        assert moved(model.hidden(row, noisy, latent=z_BSd), before) == only(place // SIZE)
    for block in range(BLOCKS):
        other_BSd, t_BS = z_BSd.clone(), corruption.t_BS.clone()
        other_BSd[0, block] += 1.0
        t_BS[0, block] *= 0.5
        assert moved(model.hidden(row, corruption, latent=other_BSd), before) == only_from(block)
        timely = replace(corruption, t_BS=t_BS)
        assert moved(model.hidden(row, timely, latent=z_BSd), before) == (only(block) if timed else [False] * BLOCKS)


@pytest.mark.parametrize("name", LATENTS)
@torch.no_grad()
def test_earlier_latents_speak_through_clean_keys_alone(name: str, build: Build, row: Batch) -> None:
    """With a document for every block no clean key of an earlier block is in sight, and z^(<b) is not heard."""
    config = replace(LATENTS[name], block_size=SIZE)
    model = build(config)
    apart = replace(row, document_BL=torch.arange(LENGTH)[None] // SIZE)
    corruption = corrupted(apart, config)
    z_BSd = torch.randn(1, BLOCKS, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model.hidden(apart, corruption, latent=z_BSd)
    for block in range(BLOCKS):
        other_BSd = z_BSd.clone()
        other_BSd[0, block] += 1.0
        assert moved(model.hidden(apart, corruption, latent=other_BSd), before) == only(block)


@pytest.mark.parametrize("fusion", ["add", "concat", "reweight", "literal"])
@torch.no_grad()
def test_hints_are_heard_in_their_own_block(fusion: str, build: Build, row: Batch) -> None:
    config = replace(PLAIN, block_size=SIZE, augmentation=AugmentationConfig(fusion=fusion))  # type: ignore[arg-type]
    model, corruption = build(config), corrupted(row, config)
    before = model.hidden(row, corruption, hint=model.draw_hint(corruption))
    for number, place in enumerate(corruption.rows_M[: corruption.num_masked].tolist()):
        targets_M = corruption.targets_M.clone()
        targets_M[number] = (targets_M[number] + 1) % SYMBOLS
        hint_BLD = model.draw_hint(replace(corruption, targets_M=targets_M))
        assert moved(model.hidden(row, corruption, hint=hint_BLD), before) == only(place // SIZE)


CANVASES = {
    "plain": PLAIN,
    "timed": replace(CONDITIONED, time_conditioning=True),
    **LATENTS,
    **{
        fusion: replace(
            LATENTS["adaln"],
            time_conditioning=True,
            augmentation=AugmentationConfig(fusion=fusion),
        )
        for fusion in ("add", "concat", "reweight", "literal")
    },
    "positions": replace(PLAIN, backbone=replace(BACKBONE, max_positions=LENGTH)),
}


@pytest.mark.parametrize("name", CANVASES)
@torch.no_grad()
def test_samplers_see_what_training_saw(name: str, build: Build, make_batch: MakeBatch) -> None:
    """Two streams at once, or block after block on one stream, with a cache of finished blocks or without."""
    config = replace(CANVASES[name], block_size=SIZE)
    model, batch = build(config), make_batch(3, LENGTH, SYMBOLS)
    corruption = corrupted(batch, config)
    x_t_BL, t_BS = corruption.x_t_BL, corruption.t_BS
    z_BSd = None if model.latent is None else model.draw_latent(batch, corruption).z_BSd
    hint, z_t_BLD = None, None
    if model.augmentation is not None:
        hint = model.draw_hint(corruption)
        real = slice(0, corruption.num_masked)
        rows_M, sequence_M = corruption.rows_M[real], corruption.sequence_M[real]
        noise_MD = corruption.key.stream("hint").at(sequence_M, rows_M % LENGTH).normal(DIM)
        z0_MD = model.augmentation.clean(F.embedding(corruption.targets_M[real], model.denoiser.embed.weight))
        z_t_MD = model.augmentation.noisy(z0_MD, t_BS[sequence_M, rows_M % LENGTH // SIZE], noise_MD)
        z_t_BLD = torch.zeros(3 * LENGTH, DIM, dtype=torch.float64).index_copy(0, rows_M, z_t_MD).view(3, LENGTH, DIM)
    trained = model.hidden(batch, corruption, hint=hint, latent=z_BSd)
    cache = KVCache()
    for block in range(BLOCKS):
        own = slice(block * SIZE, block * SIZE + SIZE)
        z_own = None if z_BSd is None else z_BSd[:, block : block + 1]
        hint_own = None if z_t_BLD is None else z_t_BLD[:, own]
        with_cache = model.denoise(x_t_BL[:, own], t=t_BS[:, block], hint=hint_own, latent=z_own, cache=cache.reading())
        no_hint = None if hint_own is None else torch.zeros_like(hint_own)
        model.denoise(batch.tokens_BL[:, own], t=torch.zeros(3), hint=no_hint, latent=z_own, cache=cache)
        x_BL = torch.cat((batch.tokens_BL[:, : own.start], x_t_BL[:, own]), 1)
        times = torch.cat((torch.zeros(3, block), t_BS[:, block : block + 1]), 1)
        so_far = None if z_BSd is None else z_BSd[:, : block + 1]
        hint_far = None if hint_own is None else F.pad(hint_own, (0, 0, own.start, 0))
        without = model.denoise(x_BL, t=times, hint=hint_far, latent=so_far)[:, own]
        for found in (with_cache, without):
            assert torch.allclose(found, trained[:, own], atol=1e-9)


@pytest.mark.parametrize("name", CANVASES)
@torch.no_grad()
def test_a_block_of_all_positions_is_the_plain_model(name: str, build: Build, make_batch: MakeBatch) -> None:
    batch = make_batch(4, LENGTH, SYMBOLS)
    for function in (corrupt, corrupt_uniform_count):
        losses = []
        for block_size in (0, LENGTH):
            config = replace(CANVASES[name], block_size=block_size)
            corruption = function(batch, NoiseKey(0, 0, batch.index_B), config)
            losses.append(build(config)(batch, corruption, step=StepSchedule()).loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


TINY, LETTERS = 4, 3
SEQUENCES = torch.tensor(list(itertools.product(range(LETTERS), repeat=TINY)))
TINY_CONFIG = ModelConfig(backbone=BACKBONE, vocab_size=LETTERS + 1, mask_id=LETTERS)


def batch_of(tokens_BL: Tensor, **changes: Tensor) -> Batch:
    ones_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    places = torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)
    return replace(Batch(tokens_BL, ones_BL, places, torch.arange(len(tokens_BL))), **changes)


@torch.no_grad()
def nats_of(model: MaskedDiffusion, batch: Batch) -> Tensor:
    """The loss of each sequence where every position is counted once."""
    corruption = corrupt_uniform_count(batch, NoiseKey(0, 0, batch.index_B), model.config)
    assert corruption.num_masked == int(batch.maskable_BL.sum())
    assert bool((corruption.weight_M[: corruption.num_masked] == 1).all())
    loss_B: Tensor = model(batch, corruption, step=StepSchedule()).loss_B
    return loss_B


ORDERED = {
    "blocks of one": replace(TINY_CONFIG, block_size=1),
    "autoregressive": replace(TINY_CONFIG, autoregressive=True),
    "autoregressive decoder": replace(
        TINY_CONFIG,
        autoregressive=True,
        backbone=replace(BACKBONE, norm="rmsnorm", ffn="swiglu", num_kv_heads=1, tie_embeddings=True),
    ),
}


@pytest.mark.parametrize("name", ORDERED)
def test_one_token_at_a_time_is_a_distribution(name: str, build: Build) -> None:
    model = build(ORDERED[name], scale=0.7)
    nats_B = nats_of(model, batch_of(SEQUENCES))
    assert nats_B.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert nats_B.std() > 0.3
    for place in range(TINY):
        given = batch_of(SEQUENCES, maskable_BL=(torch.arange(TINY) >= place).expand_as(SEQUENCES))
        rest = nats_of(model, given).neg().exp().view(LETTERS**place, -1).sum(1)
        assert torch.allclose(rest, torch.ones_like(rest), atol=1e-6)


@pytest.mark.parametrize("name", ORDERED)
@torch.no_grad()
def test_a_position_depends_on_what_comes_before_it_alone(name: str, build: Build) -> None:
    config = ORDERED[name]
    model = build(config)

    def hidden(tokens_BL: Tensor) -> Tensor:
        batch = batch_of(tokens_BL)
        return model.hidden(batch, corrupt_uniform_count(batch, NoiseKey(0, 0, batch.index_B), config))

    tokens_BL = torch.tensor([[0, 1, 2, 1, 0, 2, 2]])
    before = hidden(tokens_BL)
    for place in range(7):
        changed = tokens_BL.clone()
        changed[0, place] = (changed[0, place] + 1) % LETTERS
        moved_L = (hidden(changed) - before).abs().amax(2)[0]
        assert (moved_L > 1e-6).tolist() == [i > place for i in range(7)]
        assert not moved_L[: place + 1].any()


@torch.no_grad()
def test_blocks_of_one_are_the_product_of_one_step_predictions(build: Build) -> None:
    """p(x) = prod_i p(x_i | x_(<i)), each from a sequence whose last token is the mask."""
    model, x = build(ORDERED["blocks of one"]), [2, 0, 1, 1]
    total = 0.0
    for place in range(TINY):
        hidden_BLD = model.denoise(torch.tensor([[*x[:place], LETTERS]]))
        total -= model.logits(hidden_BLD[0, -1:]).log_softmax(1)[0, x[place]].item()
    assert nats_of(model, batch_of(torch.tensor([x]))).item() == pytest.approx(total, rel=1e-6)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])


@pytest.mark.parametrize("name", ORDERED)
@torch.no_grad()
def test_documents_restart(name: str, build: Build) -> None:
    model, tokens_BL = build(ORDERED[name]), torch.tensor([[0, 1, 2, 1, 0, 2, 2]])
    packed = nats_of(model, batch_of(tokens_BL, document_BL=DOCUMENTS, positions_BL=PLACES))
    alone = nats_of(model, batch_of(tokens_BL[:, :3])) + nats_of(model, batch_of(tokens_BL[:, 3:]))
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)


def test_inputs_of_the_baseline_are_shifted_behind_the_mask() -> None:
    tokens_BL = torch.tensor([[0, 1, 2, 1, 0, 2, 2]])
    assert shift_right(tokens_BL, PLACES, 9).tolist() == [[9, 0, 1, 9, 1, 0, 2]]
    batch = batch_of(tokens_BL, maskable_BL=PLACES > 0, positions_BL=PLACES, document_BL=DOCUMENTS)
    corruption = corrupted(batch, ORDERED["autoregressive"])
    assert corruption.x_t_BL.tolist() == [[3, 0, 1, 3, 1, 0, 2]]
    real = slice(0, corruption.num_masked)
    assert corruption.rows_M[real].tolist() == [1, 2, 4, 5, 6]
    assert corruption.targets_M[real].tolist() == [1, 2, 0, 2, 2]
    assert corruption.weight_M[real].tolist() == [1.0] * 5
    assert corruption.num_segments == 1


@torch.no_grad()
def test_the_baselines_sampler_sees_what_training_saw(build: Build) -> None:
    model = build(ORDERED["autoregressive"])
    batch = batch_of(SEQUENCES)
    trained = model.hidden(batch, corrupted(batch, model.config))
    assert torch.allclose(model.denoise(SEQUENCES), trained, atol=1e-12)
    hidden_BLD = model.denoise(torch.where(torch.arange(TINY) >= 2, LETTERS, SEQUENCES))
    assert torch.allclose(hidden_BLD[:, :3], trained[:, :3], atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 2])
@torch.no_grad()
def test_a_sum_over_blocks_bounds_the_likelihood_of_the_blockwise_sampler(block_size: int, build: Build) -> None:
    """Exact, by enumeration: within a block one uniformly random masked position at a time, blocks left to right."""
    model = build(replace(TINY_CONFIG, block_size=block_size), scale=0.7)
    orders = list(itertools.permutations(range(block_size)))
    starts = range(0, TINY, block_size)

    def nats(x: tuple[int, ...], start: int, hidden: tuple[int, ...]) -> Tensor:
        canvas = torch.tensor([x[: start + block_size]])
        canvas[0, [start + i for i in hidden]] = LETTERS
        rows = model.denoise(canvas)[0, start:]
        return -model.logits(rows).log_softmax(1)

    total = 0.0
    for x in itertools.product(range(LETTERS), repeat=TINY):
        exact, bound = 0.0, 0.0
        for start in starts:
            costs = [
                sum(nats(x, start, order[k:])[order[k], x[start + order[k]]].item() for k in range(block_size))
                for order in orders
            ]
            exact -= math.log(sum(math.exp(-cost) for cost in costs) / len(orders))
            bound += sum(costs) / len(orders)
        total += math.exp(-exact)
        assert bound >= exact - 1e-9
        if x == (2, 0, 1, 1):
            copies = batch_of(torch.tensor([x]).expand(3000, TINY))
            corruption = corrupt_uniform_count(copies, NoiseKey(0, 0, copies.index_B), model.config)
            loss_B = model(copies, corruption, step=StepSchedule()).loss_B
            assert abs(loss_B.mean().item() - bound) <= 5 * loss_B.std().item() / math.sqrt(3000) + 1e-5
    assert total == pytest.approx(1.0, abs=1e-5)
