"""The pieces of a block: attention and feed-forward sublayers, adaptive normalisation, counter-based dropout.

Shapes: B sequences, L positions, D width, H query heads, G key/value heads, K head width, F inner width,
S segments of a row that share a condition (1, the number of blocks, or L), C condition width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import AttentionPlan, KVCache, attend
from .config import TransformerConfig
from .noise import Stream
from .rope import rotate
from .sequence import Span


def dropout(x_BLD: Tensor, rate: float, stream: Stream | None, part: Span | None = None) -> Tensor:
    """Zeroes elements with probability `rate`, keyed by sample, so recomputation and resharding repeat the mask."""
    if stream is None or rate == 0.0:
        return x_BLD
    length = x_BLD.shape[1] * (1 if part is None else part.size)
    keep_BLD = stream.bernoulli(1.0 - rate, length, *x_BLD.shape[2:])
    return torch.where(keep_BLD if part is None else part.take(keep_BLD), x_BLD / (1.0 - rate), 0.0)


def make_norm(config: TransformerConfig, dim: int, *, affine: bool) -> nn.Module:
    """LayerNorm or RMSNorm; without scale and shift where a condition supplies them."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(dim, eps=config.norm_eps, elementwise_affine=affine)
    return nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=affine)


def modulate(x_BLD: Tensor, shift_BSD: Tensor, scale_BSD: Tensor, applies_BL: Tensor | None = None) -> Tensor:
    """x (1 + scale) + shift, each segment of the row with its own vector, where it applies (default: everywhere)."""
    segments = x_BLD.unflatten(1, (shift_BSD.shape[1], -1))
    modulated = (segments * (1.0 + scale_BSD[:, :, None]) + shift_BSD[:, :, None]).flatten(1, 2)
    return modulated if applies_BL is None else torch.where(applies_BL[:, :, None], modulated, x_BLD)


def gate(x_BLD: Tensor, gate_BSD: Tensor) -> Tensor:
    """x times a vector per segment (the zero of adaLN-zero)."""
    return (x_BLD.unflatten(1, (gate_BSD.shape[1], -1)) * gate_BSD[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_width
        inner, shared = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q = nn.Linear(config.dim, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.dim, shared, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, shared, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.dim, bias=False)

    def forward(
        self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None
    ) -> Tensor:
        query_BLHK = rotate(self.q(x_BLD).unflatten(-1, (-1, self.head_dim)), rotary)
        key_BLGK = rotate(self.k(x_BLD).unflatten(-1, (-1, self.head_dim)), rotary)
        value_BLGK = self.v(x_BLD).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            key_BLGK, value_BLGK = cache.extend(self.layer, key_BLGK, value_BLGK)
        return self.out(attend(query_BLHK, key_BLGK, value_BLGK, plan).flatten(2))


class FeedForward(nn.Module):
    """GELU or SwiGLU; the latter has a third matrix, the gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_width, bias=False) if config.ffn == "swiglu" else None
        self.up = nn.Linear(config.dim, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        inner_BLF = self.up(x_BLD)
        if self.gate is None:
            return self.down(F.gelu(inner_BLF, approximate="tanh"))
        return self.down(F.silu(self.gate(x_BLD)) * inner_BLF)


class Block(nn.Module):
    """A pre-norm block; with a condition, adaLN vectors shift, scale and (unless gates=none) gate its sublayers."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.part: Span | None = None
        self.gates, self.num_modulated = config.gates, config.num_modulated
        self.attention_norm = make_norm(config, config.dim, affine=config.affine)
        self.attention = Attention(config, layer)
        self.ffn_norm = make_norm(config, config.dim, affine=config.affine)
        self.ffn = FeedForward(config)
        own = config.condition_dim > 0 and config.modulation == "per_block"
        self.modulation = nn.Linear(config.condition_dim, self.num_modulated * config.dim) if own else None

    def forward(
        self,
        x_BLD: Tensor,
        rotary: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        modulation_BSC: Tensor | None = None,
        applies_BL: Tensor | None = None,
        cache: KVCache | None = None,
        streams: tuple[Stream | None, Stream | None] = (None, None),
    ) -> Tensor:
        """`modulation_BSC` is the condition, or (shared modulation) the vectors themselves.

        `streams` are those of the two sublayers' dropout. Nothing here depends on the layer's number, so that a
        compiled block serves all layers.
        """
        if modulation_BSC is None:
            attended = self.attention(self.attention_norm(x_BLD), rotary, plan, cache)
            x_BLD = x_BLD + dropout(attended, self.dropout, streams[0], self.part)
            return x_BLD + dropout(self.ffn(self.ffn_norm(x_BLD)), self.dropout, streams[1], self.part)
        vectors = modulation_BSC if self.modulation is None else self.modulation(F.silu(modulation_BSC))
        of_attention, of_ffn = (half.chunk(self.num_modulated // 2, dim=-1) for half in vectors.chunk(2, dim=-1))
        normed = modulate(self.attention_norm(x_BLD), of_attention[0], of_attention[1], applies_BL)
        attended = dropout(self.attention(normed, rotary, plan, cache), self.dropout, streams[0], self.part)
        x_BLD = x_BLD + self._gated(attended, of_attention)
        fed = self.ffn(modulate(self.ffn_norm(x_BLD), of_ffn[0], of_ffn[1], applies_BL))
        return x_BLD + self._gated(dropout(fed, self.dropout, streams[1], self.part), of_ffn)

    def _gated(self, x_BLD: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        if self.gates == "none":
            return x_BLD
        return gate(x_BLD, vectors[2] + 1.0 if self.gates == "one" else vectors[2])


class TimeEmbedding(nn.Module):
    """Sinusoids of t in [0, 1] and a two-layer perceptron: times [B, S] to vectors [B, S, C]."""

    NUM_FREQUENCIES = 128

    def __init__(self, condition_dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * self.NUM_FREQUENCIES, condition_dim)
        self.outer = nn.Linear(condition_dim, condition_dim)

    def forward(self, t_BS: Tensor) -> Tensor:
        steps = torch.arange(self.NUM_FREQUENCIES, dtype=torch.float32, device=t_BS.device)
        frequencies = torch.exp(-math.log(10_000.0) * steps / self.NUM_FREQUENCIES)
        angles = 1000.0 * t_BS[..., None].float() * frequencies
        features = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(features)))
