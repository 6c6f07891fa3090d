"""Spikes: gradients that are not finite or far larger than lately, judged on the device, alike on every rank."""

import torch
from torch import Tensor

from ..config import TrainConfig
from ..state import TrainState

REMEMBERED = 50
"""Steps over which the average of the norms forgets."""
LEAST = 20
"""Norms before it is trusted."""
MAX_ROLLBACKS = 5
"""Returns to one checkpoint, after which a run is given up."""


class Spiked(Exception):
    """A spike ends the run; the message says why."""


class SpikeGuard:
    """Which updates are taken; its average is part of the TrainState.

    Args:
        config: `spike_factor` times the average norm is a spike, 0: only what is not finite; `on_spike` what follows.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.factor, self.policy = config.spike_factor, config.on_spike
        self.mean, self.count = torch.zeros(()), torch.zeros(())
        self.returns: tuple[int, int] = (-1, 0)

    def judge(self, norm: Tensor) -> Tensor:
        """1 where the update is to be taken and 0 at a spike, without waiting for the device.

        norm: the global gradient norm, the same bits on every rank. A finite spike counts as the limit that it
        exceeds, so that norms which grow for good are taken in time.
        """
        finite = torch.isfinite(norm)
        if not self.factor:
            return finite.float()
        mean, count = self.mean.to(norm), self.count.to(norm)
        limit = torch.where(count >= LEAST, self.factor * mean, torch.inf)
        moved = mean + (torch.minimum(norm, limit) - mean) / (count + 1).clamp(max=REMEMBERED)
        self.mean = torch.where(finite, moved, mean)
        self.count = (count + finite).clamp(max=REMEMBERED)
        return (finite & (norm <= limit)).float()

    def needs_host(self) -> bool:
        """Whether the loop must know of a spike at once, and so wait for the device every step."""
        return self.policy != "skip"

    def save(self, state: TrainState) -> None:
        """Puts the average into the state; waits for the device."""
        state.typical_norm, state.num_norms = float(self.mean), int(self.count)

    def load(self, state: TrainState) -> None:
        """Takes the average from the state."""
        self.mean, self.count = torch.tensor(state.typical_norm), torch.tensor(float(state.num_norms))

    def count_return(self, step: int) -> None:
        """Counts the returns to the checkpoint of a step in a row.

        Raises:
            Spiked: there were too many.
        """
        last, count = self.returns
        self.returns = (step, count + 1 if step == last else 1)
        if self.returns[1] > MAX_ROLLBACKS:
            raise Spiked(f"{MAX_ROLLBACKS} rollbacks to step {step} led to a spike each")
