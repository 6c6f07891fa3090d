"""Says once when the latents stay silent: a collapsed posterior shows in no loss."""

import sys

from ..config import TrainConfig
from .base import Hook, StepRecord

SILENT_KL = 0.05
"""Nats per sequence or block below which a latent says nothing worth having."""
PATIENCE = 10
"""Log lines in a row, all of them after the annealing, before it is said."""


class CollapseWarning(Hook):
    """Prints one sentence on stderr when the KL of the latents stays near 0 after annealing and warm-up are over."""

    def __init__(self, train: TrainConfig, *, warmup_steps: int = 0) -> None:
        self.train = train
        self.begin = max(train.kl_hold_steps + train.kl_anneal_steps, warmup_steps)
        self.silent_lines = 0

    def on_log(self, record: StepRecord) -> None:
        """Counts the silent lines."""
        if record.latent is None or record.step <= self.begin or self.silent_lines >= PATIENCE:
            return
        self.silent_lines = self.silent_lines + 1 if record.latent.kl < SILENT_KL else 0
        if self.silent_lines == PATIENCE:
            self._warn(record.step, record.latent.kl)

    def _warn(self, step: int, kl: float) -> None:
        text = (
            f"penumbra: the latents say almost nothing (KL {kl:.3f} nats at step {step}, under {SILENT_KL} for "
            f"{PATIENCE} log lines): try a longer train.kl_anneal_steps (now {self.train.kl_anneal_steps}), "
            f"train.kl_hold_steps before it (now {self.train.kl_hold_steps}), a lower train.kl_weight (now "
            f"{self.train.kl_weight:g}), or a smaller model.backbone"
        )
        print(f"\r\x1b[2K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
