"""What the model consumes: one batch of packed sequences.

Shapes: B sequences, L positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens and what is known about every position.

    Args:
        tokens_BL: clean token ids, int64.
        maskable_BL: positions the diffusion may hide, bool: not prompts, clues or padding.
        positions_BL: position within the document, int64.
        index_B: global sample index, int64: the argument of every random number of the row.
        document_BL: document number within the row, int32, -1 at padding; None: every row is one document.
        label_B: class or attribute of the sequence, int64, where the source has one.
    """

    tokens_BL: Tensor
    maskable_BL: Tensor
    positions_BL: Tensor
    index_B: Tensor
    document_BL: Tensor | None = None
    label_B: Tensor | None = None

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> Self:
        """Wraps the plain dictionary a loader yields."""
        return cls(
            tokens_BL=rows["tokens"],
            maskable_BL=rows["maskable"],
            positions_BL=rows["positions"],
            index_B=rows["index"],
            document_BL=rows.get("document"),
            label_B=rows.get("label"),
        )

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.tokens_BL.shape[0]

    def rows(self, start: int, stop: int) -> Self:
        """The sequences start..stop."""
        return self._map(lambda tensor: tensor[start:stop])

    def repeated(self, times: int) -> Self:
        """The sequences that many times over, [times * B]."""
        return self._map(lambda tensor: tensor.repeat(times, *(1,) * (tensor.dim() - 1)))

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from which copies to a GPU need no wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        mapped: dict[str, Any] = {k: v if v is None else function(v) for k, v in vars(self).items()}
        return type(self)(**mapped)
