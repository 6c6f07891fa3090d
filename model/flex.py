"""Attention by PyTorch's FlexAttention: the mask is a function of indices, compiled into the kernel on a GPU.

On the CPU it runs uncompiled and forward only, which is enough to compare it with SDPA.

Shapes: B sequences, Q queries, S keys, H query heads, G key/value heads, K head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .masks import MaskSpec

VARIANTS = 64
"""Compiled forms (training or not, each mask and shape) before PyTorch falls back to computing all scores at once."""


@dataclass(frozen=True)
class FlexPlan:
    """Which tiles of the score matrix to compute, and the rule within them; None where nothing is hidden."""

    block_mask: BlockMask | None
    kernel: Callable[..., Tensor]

    @classmethod
    def of(cls, mask: MaskSpec, num_queries: int, num_cached: int, device: torch.device) -> "FlexPlan":
        """For queries that follow `num_cached` earlier keys.

        A mask that depends on nothing but its shape is built once; documents are new each time, an annealing each step.
        """
        if device.type == "cpu":
            build, kernel = create_block_mask, cast(Callable[..., Tensor], flex_attention)
        else:
            build, kernel = _compiled(create_block_mask), _compiled(flex_attention)
        if mask.document_BL is None and mask.annealing is None:
            return cls(_fixed_block_mask(mask, num_queries, num_cached, device), kernel)
        return cls(_block_mask(mask, num_queries, num_cached, device, build), kernel)

    def attend(self, query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor) -> Tensor:
        """[B, Q, H, K]."""
        out_BHQK = self.kernel(
            query_BQHK.transpose(1, 2),
            key_BSGK.transpose(1, 2),
            value_BSGK.transpose(1, 2),
            block_mask=self.block_mask,
            enable_gqa=query_BQHK.shape[2] != key_BSGK.shape[2],
        )
        return out_BHQK.transpose(1, 2)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, recompile_limit=VARIANTS)  # type: ignore[call-overload]


@lru_cache(maxsize=64)
def _fixed_block_mask(mask: MaskSpec, num_queries: int, num_cached: int, device: torch.device) -> BlockMask | None:
    """Outlives the call, so it must not be an inference tensor, which no backward pass could use later."""
    with torch.inference_mode(False):
        return _block_mask(mask, num_queries, num_cached, device, create_block_mask)


def _block_mask(
    mask: MaskSpec, num_queries: int, num_cached: int, device: torch.device, build: Callable[..., BlockMask]
) -> BlockMask | None:
    sees = mask.rule(num_cached + num_queries, device)
    if sees is None:
        return None

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(row, num_cached + query, key)

    num_rows = None if mask.document_BL is None else mask.document_BL.shape[0]
    return build(mask_mod, num_rows, None, num_queries, num_cached + num_queries, device=device)
