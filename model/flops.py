"""Floating-point operations of a step, counted from the configuration; two per multiply-add.

Attention is bidirectional and counted in full; the head is counted on the rows it runs on.
"""

from .config import ModelConfig


def forward_flops(config: ModelConfig, *, num_sequences: int, length: int, num_rows: int) -> int:
    """Operations of one forward pass over `num_sequences` rows of `length` tokens with the head on `num_rows`."""
    b, tokens = config.backbone, num_sequences * length
    heads, shared = b.num_heads * b.head_width, b.kv_heads * b.head_width
    matrices = 2 if b.ffn == "gelu" else 3
    per_token = 2 * b.dim * (2 * heads + 2 * shared + matrices * b.ffn_width)
    attention = 4 * length * heads
    modulation = 2 * b.condition_dim * (6 * b.dim * (b.num_layers if b.modulation == "per_block" else 1) + 2 * b.dim)
    head = 2 * b.dim * config.vocab_size
    return tokens * b.num_layers * (per_token + attention) + num_sequences * modulation + num_rows * head


def training_flops(config: ModelConfig, *, num_sequences: int, length: int, num_rows: int) -> int:
    """Operations of a forward and a backward pass; recomputation is not useful work and not counted."""
    return 3 * forward_flops(config, num_sequences=num_sequences, length=length, num_rows=num_rows)
