"""FlashAttention over variable lengths: rows or documents laid end to end, no mask at all.

PyTorch brings such a kernel for NVIDIA GPUs; where the flash-attn package is installed, its newer one attends.

Shapes: B sequences, L positions, Q queries, S keys, H query heads, G key/value heads, K head width, N segments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from .masks import MaskSpec

Kernel = Callable[..., Tensor]
"""flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal)."""


@dataclass(frozen=True)
class FlashPlan:
    """Segments that attend within themselves; causal ones align their last query with their last key.

    Args:
        cu_seqlens_q: where segments of the queries begin, then the end, int32 [N + 1].
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: positions of the longest segment of queries.
        max_seqlen_k: the same of the keys.
        causal: whether a query sees only keys up to its own position.
        kernel: what attends.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    kernel: Kernel

    @classmethod
    def of(
        cls, mask: MaskSpec, num_rows: int, num_queries: int, num_cached: int, device: torch.device, kernel: Kernel
    ) -> "FlashPlan":
        """For `num_rows` rows of queries that follow `num_cached` earlier keys.

        Raises:
            ValueError: a document is in several pieces.
        """
        causal, num_keys = mask.direction == "causal", num_cached + num_queries
        if mask.document_BL is not None:
            ends, longest = document_segments(mask.document_BL)
            return cls(ends, ends, longest, longest, causal, kernel)
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        return cls(rows * num_queries, rows * num_keys, num_queries, num_keys, causal, kernel)

    def attend(self, query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor) -> Tensor:
        """[B, Q, H, K]."""
        out = self.kernel(
            query_BQHK.flatten(0, 1),
            key_BSGK.flatten(0, 1),
            value_BSGK.flatten(0, 1),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            causal=self.causal,
        )
        return out.unflatten(0, query_BQHK.shape[:2])


def document_segments(document_BL: Tensor) -> tuple[Tensor, int]:
    """Where the documents of all rows begin, then the end, int32 [N + 1], and the length of the longest.

    Waits for the device once: the kernel wants the longest as a number.

    Raises:
        ValueError: a document number comes back after another within a row.
    """
    number_BL = document_BL.cpu()
    begins_BL = torch.ones_like(number_BL, dtype=torch.bool)
    begins_BL[:, 1:] = number_BL[:, 1:] != number_BL[:, :-1]
    num_distinct_B = 1 + (number_BL.sort(dim=1).values.diff(dim=1) != 0).sum(1)
    if broken := (num_distinct_B != begins_BL.sum(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"row {broken[0]} of document_BL holds a document in several pieces, and train.attention=flash takes "
            "each for a document of its own: lay them in one piece, or set train.attention=flex"
        )
    ends = torch.cat((begins_BL.flatten().nonzero()[:, 0], torch.tensor([number_BL.numel()])))
    return ends.int().to(document_BL.device, non_blocking=True), int(ends.diff().max())


def flash_kernel() -> Kernel:
    """flash-attn's kernel where the package is installed, else PyTorch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return varlen
    kernel: Kernel = flash_attn_varlen_func
    return kernel


def varlen(query: Tensor, key: Tensor, value: Tensor, *segments: Tensor | int, causal: bool) -> Tensor:
    """[N, H, K] by PyTorch's kernel, which takes head widths in multiples of eight; zeros add nothing to a product."""
    width = query.shape[-1]
    padded = [F.pad(x, (0, -width % 8)) for x in (query, key, value)]
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    window = (-1, 0 if causal else -1)
    out: Tensor = varlen_attn(*padded, *segments, scale=width**-0.5, window_size=window, **grouped)  # type: ignore
    return out[..., :width]
