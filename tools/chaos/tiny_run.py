"""The run that trials disturb: seconds long, with everything in it that a resume must carry."""

from pathlib import Path

from pretrain.config import RunConfig
from pretrain.settings import validate

STEPS = 40
SAVE_EVERY = 4


def tiny_run(folder: Path) -> RunConfig:
    """A masked diffusion with a latent, dropout, averaged weights, prefetching and frequent saves."""
    return validate(
        {
            "name": "chaos",
            "folder": str(folder),
            "data": {"kind": "patterns", "toy": "needle", "length": 16, "num_workers": 1},
            "model": {
                "vocab_size": 13,
                "mask_id": 10,
                "backbone": {
                    "dim": 32,
                    "num_layers": 2,
                    "num_heads": 2,
                    "dropout": 0.1,
                    "max_positions": 16,
                    "condition_dim": 32,
                },
                "latent": {"dim": 8, "recognition": {"num_layers": 1}},
            },
            "optim": {"lr": 3e-3, "warmup_steps": 4},
            "train": {
                "steps": STEPS,
                "batch_tokens": 512,
                "ema_decay": 0.9,
                "kl_anneal_steps": 20,
                "spike_factor": 100.0,
            },
            "log": {"every": 1},
            "validation": {"every": 10, "num_sequences": 8},
            "checkpoint": {"every": SAVE_EVERY, "keep": 2},
        }
    )
