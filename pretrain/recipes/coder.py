"""Diffusion coders in the shapes of Qwen2.5-Coder: sizes to build, plan and adapt.

Their embedding tables have spare rows after the tokenizer's own tokens; the mask takes the first of them.
"""

from dataclasses import replace

from model.config import AugmentationConfig, ModelConfig, TransformerConfig

from ..config import CheckpointConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import ShardData


def coder_0_5b() -> RunConfig:
    """0.5B parameters: 24 layers x 896, 14 heads over 2, tied head."""
    return _coder(
        "coder_0_5b",
        vocab_size=151_936,
        dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        ffn_dim=4864,
        tied=True,
    )


def coder_1_5b() -> RunConfig:
    """1.5B parameters: 28 layers x 1536, 12 heads over 2, tied head."""
    return _coder(
        "coder_1_5b",
        vocab_size=151_936,
        dim=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        ffn_dim=8960,
        tied=True,
    )


def coder_7b() -> RunConfig:
    """7.6B parameters: 28 layers x 3584, 28 heads over 4, own head."""
    return _coder(
        "coder_7b",
        vocab_size=152_064,
        dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        ffn_dim=18_944,
        tied=False,
    )


def coder_7b_cadd() -> RunConfig:
    """7.6B parameters with hints: CADD's coder on 65B tokens, for 64 GPUs of 80 GB (CADD Section 4.3).

    Readings: batch, length and learning rate are not published; hints start at nothing, behind a gate, so that the
    model starts as the one it is adapted from. Rows of a rank are one micro-batch: FSDP keeps whole gradients between
    micro-batches, which 7.6B parameters have no room for.
    """
    run = coder_7b()
    model = replace(run.model, augmentation=AugmentationConfig(gated=True), loss_weight="uniform")
    return replace(run, name="coder_7b_cadd", model=model, train=replace(run.train, micro_batch_tokens=32_768))


def _coder(
    name: str,
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_dim: int,
    tied: bool,
) -> RunConfig:
    backbone = TransformerConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn_dim=ffn_dim,
        norm="rmsnorm",
        ffn="swiglu",
        qkv_bias=True,
        tie_embeddings=tied,
        rope_theta=1_000_000.0,
    )
    return RunConfig(
        name=name,
        data=ShardData(path="data/code", length=4096, num_workers=2),
        model=ModelConfig(backbone=backbone, vocab_size=vocab_size),
        optim=OptimConfig(lr=1e-5, schedule="constant", warmup_steps=2000),
        train=TrainConfig(
            steps=31_000, batch_tokens=2_097_152, micro_batch_tokens=4096, precision="bf16", recompute="full"
        ),
        validation=ValidationConfig(every=1000, num_sequences=256),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
