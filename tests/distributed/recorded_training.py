"""Trains several configurations one after the other in one set of processes, and records what each rank masked.

Usage: torchrun ... recorded_training.py CONFIG.yaml ...; writes RUN/noise-RANK.json.
"""

import contextlib
import json
import sys
from pathlib import Path

from model.diffusion import LossTerms
from pretrain.config import load_config
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel import mesh
from pretrain.train import train


def record_noise(seen: dict[int, tuple[float, list[int]]]) -> None:
    """From now on `seen` gets t and the corrupted tokens of every sample, by global index."""
    forward_backward = FsdpEngine.forward_backward

    def recording(engine: FsdpEngine, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        for row, index in enumerate(micro.batch.index_B.tolist()):
            seen[index] = (float(micro.corruption.t_BS[:, 0][row]), micro.corruption.x_t_BL[row].tolist())
        return forward_backward(engine, micro, scale=scale, last=last)

    FsdpEngine.forward_backward = recording  # type: ignore[method-assign, assignment]


def main(paths: list[str]) -> None:
    """Runs the configurations."""
    seen: dict[int, tuple[float, list[int]]] = {}
    record_noise(seen)
    with mesh.process_mesh() as devices:
        mesh.process_mesh = lambda parallel=None: contextlib.nullcontext(devices)  # type: ignore[assignment, misc]
        for path in paths:
            seen.clear()
            config = load_config(Path(path))
            train(config)
            (config.path / f"noise-{devices.world.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1:])
