"""Exponential moving average of the weights, sharded as they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """A float32 shadow of every parameter.

    Args:
        parameters: the weights that are averaged (parameters, or the masters behind them), by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = list(parameters.values())
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, decay: float, take: Tensor) -> None:
        """shadow += (1 - decay) (weight - shadow), or nothing where `take` is 0."""
        for average, weight in zip(self.shadow.values(), self.parameters, strict=True):
            average.lerp_(weight.detach(), (1.0 - decay) * take)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the context the model computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self.shadow.values(), self.parameters, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
