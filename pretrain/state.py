"""Everything a resume needs that is not a tensor."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Where a run stands. Noise, data order and learning rate are functions of it and of the seed.

    Args:
        step: optimizer steps finished, skipped ones included; also the data position (step x batch rows).
        tokens: input tokens seen.
        skipped: steps whose update was not taken.
        resumes: how often the run was continued from a checkpoint.
        identity: what noise and data order depend on besides the step (seed, batch, row length, data, tokenizer).
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    resumes: int = 0
    identity: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)
