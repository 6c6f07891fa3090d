"""Trains several configurations one after the other in one set of processes, and records what each rank masked.

For the machine's speed it takes one operation per second, so that MFU tells what is counted.

Usage: torchrun ... recorded_training.py CONFIG.yaml ...; writes RUN/noise-RANK.json.
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

from model.diffusion import LossTerms
from pretrain import throughput
from pretrain.config import ParallelConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel import mesh
from pretrain.settings import load_config
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
    throughput.peak_flops = lambda device, precision: 1.0
    with mesh.process_mesh() as alone_or_sharded:
        mesh.process_mesh = partial(divided, alone_or_sharded)  # type: ignore[assignment]
        for path in paths:
            seen.clear()
            config = load_config(Path(path))
            train(config)
            (config.path / f"noise-{alone_or_sharded.world.rank}.json").write_text(json.dumps(seen))


def divided(whole: mesh.Mesh, parallel: ParallelConfig) -> contextlib.nullcontext[mesh.Mesh]:
    """The processes of a mesh divided as a configuration asks; they are started once."""
    shape = mesh.mesh_shape(parallel, whole.world.size)
    return contextlib.nullcontext(whole if whole.devices is None else mesh.build_mesh(whole.device, shape))


if __name__ == "__main__":
    main(sys.argv[1:])
