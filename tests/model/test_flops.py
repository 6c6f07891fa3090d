"""The counted operations against PyTorch's own counter on real passes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import losses
from model.batch import Batch
from model.config import (
    AugmentationConfig,
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    ScheduleConfig,
    TransformerConfig,
)
from model.corruption import corrupt
from model.diffusion import MaskedDiffusion, StepSchedule
from model.flops import forward_flops, sampling_flops, training_flops
from model.noise import NoiseKey
from model.transformer import Transformer

DIT = TransformerConfig(dim=32, num_layers=3, num_heads=4)
BACKBONES = {
    "dit": DIT,
    "decoder": replace(DIT, norm="rmsnorm", ffn="swiglu", num_kv_heads=2, qkv_bias=True, tie_embeddings=True),
    "wide heads": replace(DIT, head_dim=16, ffn_dim=40),
    "conditioned": replace(DIT, condition_dim=12),
    "shared": replace(DIT, condition_dim=12, modulation="shared"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_flops_are_those_of_a_real_pass(name: str) -> None:
    config = ModelConfig(backbone=BACKBONES[name], vocab_size=50, mask_id=49)
    model = Transformer(BACKBONES[name], 50)
    size = BACKBONES[name].condition_dim
    condition = torch.randn(2, size, requires_grad=True) if size else None
    embedded = torch.randn(2, 24, 32, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        logits = model.logits(model(embedded, condition=condition).flatten(0, 1)[:17])
        forward = counter.get_total_flops()
        logits.sum().backward()
    assert forward_flops(config, num_sequences=2, length=24, num_rows=17) == forward
    assert training_flops(config, num_sequences=2, length=24, num_rows=17) == counter.get_total_flops()


def test_the_usual_estimate_of_six_flops_per_parameter_and_token() -> None:
    backbone = TransformerConfig(
        dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, ffn_dim=18_944, norm="rmsnorm", ffn="swiglu"
    )
    config = ModelConfig(backbone=backbone, vocab_size=152_064, mask_id=0)
    flops = training_flops(config, num_sequences=1, length=512, num_rows=512)
    parameters = 7.62e9 - 152_064 * 3584  # the embedding table is looked up, not multiplied
    assert flops == pytest.approx(6 * parameters * 512, rel=0.02)


LENGTH, VOCABULARY = 32, 101
WIDE = TransformerConfig(dim=64, num_layers=4, num_heads=2)
PLAIN = ModelConfig(backbone=WIDE, vocab_size=VOCABULARY, mask_id=VOCABULARY - 1)
CONDITIONED = replace(PLAIN, backbone=replace(WIDE, condition_dim=16))
POINTS = replace(PLAIN, backbone=PointMlpConfig(dim=64, num_dimensions=LENGTH))
SWITCHES = {
    "plain": PLAIN,
    "autoregressive": replace(PLAIN, autoregressive=True),
    "blocks": replace(PLAIN, block_size=8),
    "one block": replace(PLAIN, block_size=LENGTH),
    "vadd": replace(CONDITIONED, latent=LatentConfig(dim=8)),
    "small encoder": replace(
        CONDITIONED, latent=LatentConfig(dim=8, recognition=RecognitionConfig(dim=32, num_layers=2, pool="gated"))
    ),
    "block vmd": replace(CONDITIONED, block_size=8, latent=LatentConfig(dim=8)),
    "prior given x_t": replace(CONDITIONED, block_size=8, latent=LatentConfig(dim=8, prior="x_t", prior_layers=2)),
    "prior given blocks": replace(
        CONDITIONED, block_size=4, latent=LatentConfig(dim=8, prior="earlier_blocks", prior_layers=2)
    ),
    "samples of z": replace(CONDITIONED, block_size=8, latent=LatentConfig(dim=8, num_samples=3)),
    "samples of z given blocks": replace(
        CONDITIONED, block_size=4, latent=LatentConfig(dim=8, prior="earlier_blocks", num_samples=2)
    ),
    "embedding": replace(PLAIN, latent=LatentConfig(dim=8, inject="embedding")),
    "cadd": replace(PLAIN, augmentation=AugmentationConfig(fusion="concat")),
    "points": POINTS,
    "vadd points": replace(POINTS, latent=LatentConfig(dim=8, inject="embedding")),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_flops_are_those_of_a_training_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a hundredth: embeddings of z and t, and the heads of Gaussians, are left out."""
    monkeypatch.setattr(losses, "_accumulate", lambda total, grad, hidden: total.add_(grad.T @ hidden))
    config = replace(SWITCHES[name], schedule=ScheduleConfig(t_min=1 - 1e-9))  # all masked: no rows of padding
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        tokens_BL=torch.randint(0, VOCABULARY - 1, (4, LENGTH), generator=generator),
        maskable_BL=torch.ones(4, LENGTH, dtype=torch.bool),
        positions_BL=torch.arange(LENGTH).expand(4, LENGTH),
        index_B=torch.arange(4),
    )
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MaskedDiffusion(config)(batch, corruption, step=StepSchedule()).loss.backward()
    assert corruption.num_masked == len(corruption.rows_M) == 4 * LENGTH
    counted = training_flops(config, num_sequences=4, length=LENGTH, num_rows=4 * LENGTH)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", ["plain", "blocks", "vadd", "vadd points"])
@torch.no_grad()
def test_flops_are_those_of_a_samplers_call(name: str) -> None:
    """Recognition networks are not called."""
    config = SWITCHES[name]
    model, segments = MaskedDiffusion(config), config.num_segments(LENGTH)
    x_t = torch.zeros(3, LENGTH, dtype=torch.int64)
    latent = torch.randn(3, segments, 8) if config.latent else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model.denoise(x_t, latent=latent).flatten(0, 1)[:17], torch.arange(17))
    counted = sampling_flops(config, num_sequences=3, length=LENGTH, num_rows=17)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert sampling_flops(config, num_sequences=3, length=LENGTH, num_rows=17, num_hints=4) == 4 * counted


def test_the_squared_error_costs_the_head_once_or_twice_more() -> None:
    sizes = {"num_sequences": 4, "length": LENGTH, "num_rows": 100}
    plain = forward_flops(PLAIN, **sizes)
    head = 100 * 2 * 64 * VOCABULARY
    for z0, times in (("hard", 1), ("soft", 2)):
        augmentation = AugmentationConfig(mse_weight=1.0, z0=z0)  # type: ignore[arg-type]
        assert forward_flops(replace(PLAIN, augmentation=augmentation), **sizes) == plain + times * head
