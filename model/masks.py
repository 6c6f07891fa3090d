"""What attention may see, described without naming a backend.

Shapes: B sequences, L positions of a sequence, Q queries, S keys.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may attend to.

    With blocks, one stream sees its own block and earlier ones. Two streams are the same L positions twice over, the
    second time clean. A query of the first stream sees that stream within its own block, and clean keys of earlier
    blocks; a clean query sees clean keys of its own block and earlier ones. The denoiser's first stream is x_t, which
    so never sees what it hides; the recognition network's is x_0 with the masked positions marked.

    Args:
        direction: `bidirectional`, or `causal` (a query sees keys up to its own position).
        document_BL: document numbers, int [B, L]; a query sees its own document only. None: one document per row.
        block_size: positions of a block; 0: the whole sequence is one.
        two_streams: whether the sequence is there twice, as in block training.
    """

    direction: Literal["bidirectional", "causal"] = "bidirectional"
    document_BL: Tensor | None = None
    block_size: int = 0
    two_streams: bool = False

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Boolean [B or 1, 1, Q, S], True where attention is allowed; None where everything is.

        Queries are the last `num_queries` of the keys: the earlier ones come from a cache.
        """
        visible = None
        if self.direction == "causal" and num_queries > 1:
            full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
            visible = full.tril(num_keys - num_queries)[None, None]
        if self.block_size:
            visible = self._blocks(num_keys, device)[None, None, -num_queries:]
        if self.document_BL is not None:
            document_BS = self.document_BL.repeat(1, 2) if self.two_streams else self.document_BL
            same = document_BS[:, None, -num_queries:, None] == document_BS[:, None, None, :]
            visible = same if visible is None else visible & same
        return visible

    def _blocks(self, num_keys: int, device: torch.device) -> Tensor:
        """Boolean [S, S]: what blocks and streams allow each key as a query."""
        position = torch.arange(num_keys, device=device)
        if not self.two_streams:
            block = position // self.block_size
            return block[None] <= block[:, None]
        length = num_keys // 2
        clean, block = position >= length, position % length // self.block_size
        earlier, same = block[None] < block[:, None], block[None] == block[:, None]
        return (clean[None] & earlier) | (same & (clean[None] == clean[:, None]))
