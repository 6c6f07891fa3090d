"""Attention behind one function; the mask is prepared once per forward pass and shared by all layers.

Shapes: B sequences, Q queries, S keys, H query heads, G key/value heads, K head width.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .masks import MaskSpec
from .sequence import SequencePart


@dataclass
class KVCache:
    """Keys and values of positions already processed, one pair per layer, each [B, S, G, K]."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: bool = False

    def reading(self) -> "KVCache":
        """The same keys and values; what is seen through it is not kept (a block that is still being denoised)."""
        return KVCache(self.layers, frozen=True)

    def rows(self, index_B: Tensor) -> "KVCache":
        """The cache of some of the sequences."""
        return KVCache([(key[index_B], value[index_B]) for key, value in self.layers], self.frozen)

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0][0].shape[1] if self.layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, new positions included, which are kept unless frozen."""
        if layer < len(self.layers):
            old_key, old_value = self.layers[layer]
            key, value = torch.cat((old_key, key), dim=1), torch.cat((old_value, value), dim=1)
        if not self.frozen:
            self.layers[layer:] = [(key, value), *self.layers[layer + 1 :]]
        return key, value


@dataclass(frozen=True)
class AttentionPlan:
    """A mask made ready for the backend: dense booleans where SDPA needs them, else its own causal flag."""

    visible: Tensor | None
    causal: bool
    part: SequencePart | None = None

    def of_part(self, part: SequencePart) -> "AttentionPlan":
        """What the queries of a part of the positions see, of all keys.

        Raises:
            ValueError: the positions do not divide, or the backend's own causal mask would have to be cut.
        """
        if self.causal:
            raise ValueError("parallel.context > 1 has no causal attention: set model.autoregressive=false")
        visible = self.visible
        if visible is not None and visible.shape[2] > 1:
            visible = visible[:, :, part.span(visible.shape[2])]
        return replace(self, visible=visible, part=part)


def prepare(mask: MaskSpec, num_queries: int, num_cached: int, device: torch.device) -> AttentionPlan:
    """Compiles a mask description for one forward pass.

    Raises:
        ValueError: documents together with a cache.
    """
    if mask.document_BL is not None and num_cached:
        raise ValueError("a KV cache holds one document per row: drop document_BL or the cache")
    if mask.direction == "causal" and mask.document_BL is None and not num_cached:
        return AttentionPlan(visible=None, causal=True)
    return AttentionPlan(mask.visible(num_queries, num_cached + num_queries, device), causal=False)


def attend(query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention [B, Q, H, K]; queries that see no key give zeros.

    On the CPU it computes in float32: there the bfloat16 kernel's backward pass is several times slower. On a GPU a
    dense mask leaves only kernels that do not share key heads among query heads, so these are repeated.
    """
    device, dtype = query_BQHK.device.type, query_BQHK.dtype
    groups = query_BQHK.shape[2] // key_BSGK.shape[2]
    if device != "cpu" and plan.visible is not None:
        key_BSGK, value_BSGK = (x.repeat_interleave(groups, dim=2) for x in (key_BSGK, value_BSGK))
    compute = torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype
    with torch.autocast(device, enabled=False):
        out_BHQK = scaled_dot_product_attention(
            query_BQHK.transpose(1, 2).to(compute),
            key_BSGK.transpose(1, 2).to(compute),
            value_BSGK.transpose(1, 2).to(compute),
            attn_mask=plan.visible,
            is_causal=plan.causal,
            enable_gqa=query_BQHK.shape[2] != key_BSGK.shape[2],
        )
    return out_BHQK.transpose(1, 2).to(dtype)
