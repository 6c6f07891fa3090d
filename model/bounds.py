"""Likelihood bounds as Monte Carlo estimates with their errors, in positive nats.

Shapes: B sequences.
"""

import math
from dataclasses import astuple, dataclass

from torch import Tensor


@dataclass(frozen=True)
class Bound:
    """A bound on -log p per token, its standard error, and the number of tokens it was measured on."""

    nelbo: float
    error: float
    tokens: int


@dataclass
class BoundSums:
    """Sums over sequences from which a ratio of totals and its error follow; they add up over ranks."""

    loss: float = 0.0
    loss_squared: float = 0.0
    loss_tokens: float = 0.0
    tokens: float = 0.0
    tokens_squared: float = 0.0

    def add(self, loss_B: Tensor, tokens_B: Tensor) -> None:
        """Adds sequences: their loss with the weights of `corrupt_uniform_count`, and their maskable tokens."""
        loss, tokens = loss_B.double().cpu(), tokens_B.double().cpu()
        self.loss += float(loss.sum())
        self.loss_squared += float(loss.square().sum())
        self.loss_tokens += float((loss * tokens).sum())
        self.tokens += float(tokens.sum())
        self.tokens_squared += float(tokens.square().sum())

    def as_list(self) -> list[float]:
        """For an all-reduce."""
        return list(astuple(self))

    def estimate(self) -> Bound:
        """Nats per token; the error is that of a ratio of sums, sequences being independent draws."""
        if self.tokens == 0:
            return Bound(math.nan, math.nan, 0)
        ratio = self.loss / self.tokens
        variance = self.loss_squared - 2 * ratio * self.loss_tokens + ratio**2 * self.tokens_squared
        return Bound(ratio, math.sqrt(max(0.0, variance)) / self.tokens, int(self.tokens))
