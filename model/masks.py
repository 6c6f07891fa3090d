"""What attention may see, described without naming a backend.

Shapes: B sequences, Q queries, S keys.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may attend to.

    Args:
        direction: `bidirectional`, or `causal` (a query sees keys up to its own position).
        document_BL: document numbers, int [B, L]; a query sees its own document only. None: one document per row.
    """

    direction: Literal["bidirectional", "causal"] = "bidirectional"
    document_BL: Tensor | None = None

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Boolean [B or 1, 1, Q, S], True where attention is allowed; None where everything is.

        Queries are the last `num_queries` of the keys: the earlier ones come from a cache.
        """
        visible = None
        if self.direction == "causal" and num_queries > 1:
            full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
            visible = full.tril(num_keys - num_queries)[None, None]
        if self.document_BL is not None:
            same = self.document_BL[:, None, -num_queries:, None] == self.document_BL[:, None, None, :]
            visible = same if visible is None else visible & same
        return visible
