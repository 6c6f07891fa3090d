"""Attention by PyTorch's scaled_dot_product_attention, with dense masks, on every device.

Shapes: B sequences, Q queries, S keys, H query heads, G key/value heads, K head width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .masks import MaskSpec
from .sequence import SequencePart


@dataclass(frozen=True)
class SdpaPlan:
    """Dense booleans [B or 1, 1, Q, S] where SDPA needs them, else its own causal flag."""

    visible: Tensor | None
    causal: bool
    part: SequencePart | None = None

    @classmethod
    def of(cls, mask: MaskSpec, num_queries: int, num_cached: int, device: torch.device) -> "SdpaPlan":
        """For queries that follow `num_cached` earlier keys."""
        if mask.kinds == ["causal"] and not num_cached:
            return cls(visible=None, causal=True)
        return cls(mask.visible(num_queries, num_cached + num_queries, device), causal=False)

    def of_part(self, part: SequencePart) -> "SdpaPlan":
        """For the queries of a part of the positions, whose keys other processes have to give.

        Raises:
            ValueError: the positions do not divide, or SDPA's own causal mask would have to be cut.
        """
        if self.causal:
            raise ValueError("parallel.context > 1 has no causal attention: set parallel.context=1")
        visible = self.visible
        if visible is not None and visible.shape[2] > 1:
            visible = visible[:, :, part.span(visible.shape[2])]
        return replace(self, visible=visible, part=part)

    def attend(self, query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor) -> Tensor:
        """[B, Q, H, K]. On a GPU a dense mask leaves only kernels that do not share key heads: these are repeated."""
        if self.part is not None:
            key_BSGK, value_BSGK = self.part.gather(key_BSGK), self.part.gather(value_BSGK)
        if self.visible is not None and not shares_key_heads(query_BQHK.device):
            groups = query_BQHK.shape[2] // key_BSGK.shape[2]
            key_BSGK, value_BSGK = (x.repeat_interleave(groups, dim=2) for x in (key_BSGK, value_BSGK))
        out_BHQK = scaled_dot_product_attention(
            query_BQHK.transpose(1, 2),
            key_BSGK.transpose(1, 2),
            value_BSGK.transpose(1, 2),
            attn_mask=self.visible,
            is_causal=self.causal,
            enable_gqa=query_BQHK.shape[2] != key_BSGK.shape[2],
        )
        return out_BHQK.transpose(1, 2)


def shares_key_heads(device: torch.device) -> bool:
    """Whether SDPA has a kernel there that takes a dense mask and fewer key heads than query heads."""
    return device.type == "cpu"
