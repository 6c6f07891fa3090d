"""Floating-point operations of a step, counted from the configuration; two per multiply-add.

Attention is counted in full, also where a mask hides keys; the head is counted on the rows it runs on.
"""

from dataclasses import replace

from .config import ModelConfig, PointMlpConfig, TransformerConfig, recognition_backbone


def forward_flops(config: ModelConfig, *, num_sequences: int, length: int, num_rows: int) -> int:
    """Operations of one training forward pass: `num_sequences` rows of `length` tokens, the head on `num_rows`."""
    segments = config.num_segments(length)
    streams = 2 if segments > 1 else 1
    samples = 1 if config.latent is None else config.latent.num_samples
    total = num_sequences * _network(config, streams * length, streams * segments) + num_rows * _head(config)
    total *= samples
    if config.latent is not None:
        total += num_sequences * _latent(config, streams * length, segments)
    if config.augmentation is not None:
        dim = config.backbone.dim
        if config.augmentation.fusion == "concat":
            total += num_rows * 4 * dim * dim
        if config.augmentation.mse_weight:
            total += samples * num_rows * _head(config) * (2 if config.augmentation.z0 == "soft" else 1)
    return total


def training_flops(config: ModelConfig, *, num_sequences: int, length: int, num_rows: int) -> int:
    """Operations of a forward and a backward pass; recomputation is not useful work and not counted.

    Several samples of z are weighed before the loss, which takes the head once more.
    """
    several = config.latent.num_samples if config.latent is not None and config.latent.num_samples > 1 else 0
    forward = forward_flops(config, num_sequences=num_sequences, length=length, num_rows=num_rows)
    return 3 * forward + several * num_rows * _head(config)


def sampling_flops(config: ModelConfig, *, num_sequences: int, length: int, num_rows: int, num_hints: int = 1) -> int:
    """Operations of one network call of a sampler on whole sequences, the head on `num_rows`, for each hint."""
    trunk = num_sequences * _network(config, length, config.num_segments(length))
    return num_hints * (trunk + num_rows * _head(config))


def _network(config: ModelConfig, length: int, num_conditions: int) -> int:
    """One row through the denoiser, its head apart."""
    b = config.backbone
    return 2 * b.num_layers * b.dim**2 if isinstance(b, PointMlpConfig) else _trunk(b, length, num_conditions)


def _head(config: ModelConfig) -> int:
    """One row of the head; that of a point_mlp holds the outputs of every dimension."""
    b = config.backbone
    return 2 * b.dim * config.vocab_size * (b.num_dimensions if isinstance(b, PointMlpConfig) else 1)


def _latent(config: ModelConfig, length: int, segments: int) -> int:
    """One row through the recognition network and a learned prior, which meets the latents one by one."""
    assert config.latent is not None
    if isinstance(config.backbone, PointMlpConfig):
        dim = config.latent.recognition.dim or config.backbone.dim
        return 2 * dim**2 * (2 * (config.latent.recognition.num_layers or config.backbone.num_layers) + 1)
    recognition = recognition_backbone(config)
    prior = replace(recognition, num_layers=config.latent.prior_layers)
    lengths = {"normal": [], "x_t": [length], "earlier_blocks": range(1, segments + 1)}[config.latent.prior]
    priors = config.latent.num_samples if config.latent.prior == "earlier_blocks" else 1
    return _trunk(recognition, length, 0) + priors * sum(_trunk(prior, n, 0) for n in lengths)


def _trunk(b: TransformerConfig, length: int, num_conditions: int) -> int:
    """One row of `length` tokens through the blocks, `num_conditions` vectors modulating them."""
    heads, shared = b.num_heads * b.head_width, b.kv_heads * b.head_width
    matrices = 2 if b.ffn == "gelu" else 3
    per_token = 2 * b.dim * (2 * heads + 2 * shared + matrices * b.ffn_width)
    attention = 4 * length * heads
    projections = b.num_modulated * (b.num_layers if b.modulation == "per_block" else 1) + 2
    modulation = 2 * b.condition_dim * b.dim * projections
    return length * b.num_layers * (per_token + attention) + num_conditions * modulation
