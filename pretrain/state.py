"""Everything a resume needs that is not a tensor."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Where a run stands. Noise, data order and learning rate are functions of it and of the seed.

    Args:
        step: optimizer steps finished, skipped ones included.
        tokens: input tokens of these steps.
        skipped: steps whose update was not taken.
        resumes: how often the run was continued from a checkpoint.
        rollbacks: how often a spike sent it back to one.
        passed_over: batches that rollbacks left out, as positions in the data order: first, one past the last.
        typical_norm: what the gradient norm was lately, for train.spike_factor.
        num_norms: how many norms stand behind it, up to those that it remembers.
        owes_validation: the validation after `step` was cut short by a stop.
        identity: what noise and data order depend on besides the step (seed, batch, row length, data, tokenizer).
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    resumes: int = 0
    rollbacks: int = 0
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    typical_norm: float = 0.0
    num_norms: int = 0
    owes_validation: bool = False
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def num_passed_over(self) -> int:
        """Batches that no step used."""
        return sum(end - first for first, end in self.passed_over)

    @property
    def next_batch(self) -> int:
        """Position in the data order of the batch that the next step takes."""
        return self.step + self.num_passed_over

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)
