"""How long a save keeps the loop waiting: written beside the training, against written before it goes on."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from model.config import ModelConfig, TransformerConfig
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from pretrain.state import TrainState

MODEL = ModelConfig(
    backbone=TransformerConfig(dim=512, num_layers=8, num_heads=8, tie_embeddings=True),
    vocab_size=50_258,
    mask_id=50_257,
)
SETTINGS = {
    "model": "50,258 x 512 tied embeddings and 8 layers, float32, with both moments of AdamW",
    "folder": "the system's folder for temporary files",
    "stall": "seconds that the loop spends in a save; memory of the copy kept from one save to the next",
    "first_stall": "the same for the first save, which allocates that memory",
    "ratio_to": "the same save in the loop's thread, same process, alternated",
}
TARGETS = {"checkpoint.stall_ratio": 0.25}


def measure(repeats: int, model: ModelConfig = MODEL) -> dict[str, float]:
    """Medians of the stalls and of the time until a checkpoint is sealed, and their ratio."""
    engine = FsdpEngine(model, OptimConfig(), TrainConfig(), ParallelConfig(), single_process(), seed=0)
    with (
        tempfile.TemporaryDirectory() as folder,
        _saver(engine, Path(folder) / "synchronous", asynchronous=False) as synchronous,
        _saver(engine, Path(folder) / "asynchronous", asynchronous=True) as asynchronous,
    ):
        rounds = [
            (*_save(engine, synchronous, step), *_save(engine, asynchronous, step)) for step in range(repeats + 1)
        ]
    first_stall = rounds[0][2]
    synchronous_seconds, _, stall, sealed = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    num_bytes = sum(tensor.nbytes for named in engine.state_dict().values() for tensor in named.values())
    return {
        "checkpoint.stall_ratio": stall / synchronous_seconds,
        "checkpoint.stall_seconds": stall,
        "checkpoint.first_stall_seconds": first_stall,
        "checkpoint.synchronous_seconds": synchronous_seconds,
        "checkpoint.sealed_seconds": sealed,
        "checkpoint.megabytes": num_bytes / 1e6,
    }


def as_table(results: Mapping[str, float]) -> str:
    """One line per number, then one per target."""
    lines = [f"{key:<32} {value:>10,.4g}" for key, value in results.items()]
    for key, most in TARGETS.items():
        verdict = "met" if results[key] <= most else "missed"
        lines.append(f"{key} = {results[key]:.3f}, target at most {most:.2f}: {verdict}")
    return "\n".join(lines)


def _saver(engine: FsdpEngine, folder: Path, *, asynchronous: bool) -> Saver:
    config = CheckpointConfig(keep=1, asynchronous=asynchronous)
    return Saver(
        folder, config, engine.model.config, engine.mesh, save_tokenizer=None, on_sealed=lambda path, state: None
    )


def _save(engine: FsdpEngine, saver: Saver, step: int) -> tuple[float, float]:
    """Seconds until the loop may go on, and until the checkpoint is sealed."""
    start = time.perf_counter()
    saver.save(engine.state_dict(), TrainState(step=step))
    stall = time.perf_counter() - start
    saver.finish()
    return stall, time.perf_counter() - start
