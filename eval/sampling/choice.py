"""Which token a masked position takes: categorical by Gumbel-max in float64, or the most probable.

Shapes: M masked rows, V vocabulary, R rows of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.noise import Stream

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TokenChoice:
    """Temperature 0 takes the most probable token; top_p < 1 draws from the smallest set of that probability."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (most probable token) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token")

    def __call__(self, log_probs_MV: Tensor, stream_M: Stream) -> Tensor:
        """Token ids [M]; `stream_M` has one key per row."""
        if self.temperature == 0:
            return log_probs_MV.argmax(1)
        rows = max(1, CHUNK_ELEMENTS // log_probs_MV.shape[1])
        chunks = zip(log_probs_MV.split(rows), stream_M.key_B.split(rows), strict=True)
        return torch.cat([self._draw(logits_RV, Stream(key_R)) for logits_RV, key_R in chunks])

    def _draw(self, log_probs_RV: Tensor, stream_R: Stream) -> Tensor:
        logits_RV = log_probs_RV.double() / self.temperature
        if self.top_p < 1:
            logits_RV = _nucleus(logits_RV, self.top_p)
        return (logits_RV + stream_R.gumbel(logits_RV.shape[1])).argmax(1)


def _nucleus(logits_RV: Tensor, top_p: float) -> Tensor:
    """Removes tokens beyond the most probable ones whose probability reaches top_p."""
    sorted_RV, index_RV = logits_RV.sort(dim=1, descending=True)
    probability_RV = sorted_RV.softmax(1)
    before_RV = probability_RV.cumsum(1) - probability_RV
    removed_RV = torch.zeros_like(before_RV, dtype=torch.bool).scatter(1, index_RV, before_RV >= top_p)
    return logits_RV.masked_fill(removed_RV, -torch.inf)
