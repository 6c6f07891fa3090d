"""Which token a masked position takes: categorical by Gumbel-max in float64, or the most probable.

Shapes: M masked rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.noise import Stream


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
        logits_MV = log_probs_MV.double() / self.temperature
        if self.top_p < 1:
            logits_MV = _nucleus(logits_MV, self.top_p)
        return (logits_MV + stream_M.gumbel(logits_MV.shape[1])).argmax(1)


def _nucleus(logits_MV: Tensor, top_p: float) -> Tensor:
    """Removes tokens beyond the most probable ones whose probability reaches top_p."""
    sorted_MV, index_MV = logits_MV.sort(dim=1, descending=True)
    probability_MV = sorted_MV.softmax(1)
    before_MV = probability_MV.cumsum(1) - probability_MV
    removed_MV = torch.zeros_like(before_MV, dtype=torch.bool).scatter(1, index_MV, before_MV >= top_p)
    return logits_MV.masked_fill(removed_MV, -torch.inf)
