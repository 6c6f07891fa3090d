"""What the loop remembers between two log lines; nothing here waits for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.diffusion import LossTerms


@dataclass(frozen=True)
class Latest:
    """The newest step's sums, still on the device."""

    terms: list[LossTerms]
    norm: Tensor
    lr: float
    scale: float
    all_masked: float


@dataclass
class Window:
    """The steps since the last log line."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    flops: float = 0.0
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    latest: Latest | None = None

    def add(self, *, flops: float, skipped: Tensor, latest: Latest) -> None:
        """One more step."""
        self.steps += 1
        self.flops += flops
        self.skipped = self.skipped.to(skipped.device) + skipped
        self.latest = latest

    def take_skipped(self) -> int:
        """Skipped steps since it was last asked; waits for the device."""
        count = int(self.skipped)
        self.skipped = self.skipped * 0
        return count

    def seconds(self) -> float:
        """Wall time since the window opened, pauses left out."""
        return time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within the context does not count as training."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began
