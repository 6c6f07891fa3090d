"""What attention may see, described without naming a backend.

Shapes: B sequences, L positions of a sequence, Q queries, S keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .noise import bernoulli_at

MaskKind = Literal["bidirectional", "causal", "annealing", "documents", "blocks"]
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(row, query, key) -> whether that query may attend to that key, elementwise; queries count from the first key."""


@dataclass(frozen=True)
class Annealing:
    """How far a causal mask has opened on its way to a bidirectional one; one pattern for all rows, heads and layers.

    Args:
        ratio: of what lies ahead that is seen, in [0, 1].
        key: unsigned 64 bits; every pair of a query and a later key is seen with probability `ratio`, drawn from this
            key (DiffuLLaMA; Gong et al. 2024). None: the keys are seen that lie nearest ahead.
    """

    ratio: float
    key: int | None = None

    def ahead(self, num_keys: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """(query, later key) -> whether it is seen, elementwise."""
        if self.key is None:
            width = torch.tensor(int(self.ratio * num_keys), device=device)
            return lambda query, key: key <= query + width
        draw = bernoulli_at(self.key, self.ratio, device)
        return lambda query, key: draw((query << 32) + key)


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may attend to.

    With blocks, one stream sees its own block and earlier ones. Two streams are the same L positions twice over, the
    second time clean. A query of the first stream sees that stream within its own block, and clean keys of earlier
    blocks; a clean query sees clean keys of its own block and earlier ones. The denoiser's first stream is x_t, which
    so never sees what it hides; the recognition network's is x_0 with the masked positions marked.

    Args:
        direction: `bidirectional`, or `causal` (a query sees keys up to its own position); blocks have their own.
        annealing: which later keys a causal mask shows all the same; None: none.
        document_BL: document numbers, int [B, L]; a query sees its own document only. None: one document per row.
        block_size: positions of a block; 0: the whole sequence is one.
        two_streams: whether the sequence is there twice, as in block training.
    """

    direction: Literal["bidirectional", "causal"] = "bidirectional"
    document_BL: Tensor | None = None
    block_size: int = 0
    two_streams: bool = False
    annealing: Annealing | None = None

    @property
    def kinds(self) -> list[MaskKind]:
        """What a backend must express to attend under this mask."""
        shape: MaskKind = self.direction if self.annealing is None else "annealing"
        if self.block_size:
            shape = "blocks"
        return [shape] if self.document_BL is None else [shape, "documents"]

    def rule(self, num_keys: int, device: torch.device) -> Rule | None:
        """The mask as a function of indices on a device; None where nothing is hidden."""
        size, causal = self.block_size, self.direction == "causal"
        length = num_keys // 2 if self.two_streams else num_keys
        ahead = None if self.annealing is None else self.annealing.ahead(num_keys, device)
        document_BS = self.document_BL
        if document_BS is not None and self.two_streams:
            document_BS = document_BS.repeat(1, 2)
        if not (size or causal) and document_BS is None:
            return None

        def sees(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if size and length < num_keys:
                seen = _two_streams(query, key, length, size)
            elif size:
                seen = key // size <= query // size
            elif causal:
                seen = key <= query if ahead is None else (key <= query) | ahead(query, key)
            else:
                assert document_BS is not None
                return document_BS[row, query] == document_BS[row, key]
            return seen if document_BS is None else seen & (document_BS[row, query] == document_BS[row, key])

        return sees

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Boolean [B or 1, 1, Q, S], True where attention is allowed; None where everything is.

        Queries are the last `num_queries` of the keys: the earlier ones come from a cache.
        """
        sees = self.rule(num_keys, device)
        if sees is None or (self.kinds == ["causal"] and num_queries == 1):
            return None
        num_rows = 1 if self.document_BL is None else self.document_BL.shape[0]
        row = torch.arange(num_rows, device=device)[:, None, None, None]
        key = torch.arange(num_keys, device=device)
        return sees(row, key[None, None, -num_queries:, None], key[None, None, None, :])


def _two_streams(query: Tensor, key: Tensor, length: int, size: int) -> Tensor:
    query_clean, key_clean = query >= length, key >= length
    query_block, key_block = query % length // size, key % length // size
    return (key_clean & (key_block < query_block)) | ((key_block == query_block) & (key_clean == query_clean))
