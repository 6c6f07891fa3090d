"""What makes a run the same run, on however many processes."""

from .config import RunConfig
from .data import Data
from .parallel.mesh import Mesh


def run_identity(config: RunConfig, data: Data) -> dict[str, object]:
    """What decides noise and data order besides the step; a checkpoint continues only a run that shares it."""
    frozen = {"train.freeze": list(config.train.freeze)} if config.train.freeze else {}
    return {
        **frozen,
        "seed": config.seed,
        "train.batch_tokens": config.train.batch_tokens,
        "data.length": config.data.length,
        "data.rows": len(data.train),
        "data.tokenizer": data.tokenizer.sha256(),
    }


def rows_per_rank(config: RunConfig, mesh: Mesh) -> int:
    """Rows of the batch that each rank takes; those that divide matrices or positions take the same ones.

    Raises:
        ValueError: they do not divide among them.
    """
    rows, size, sharing = config.batch_rows, mesh.data.size, mesh.world.size // mesh.data.size
    if rows % size:
        replicas = config.parallel.replicate
        legal = [n * sharing for n in range(replicas, rows + 1, replicas) if rows % n == 0]
        together = f", {sharing} of which share a row" if sharing > 1 else ""
        advice = f"use one of {legal} processes" if legal else f"set parallel.replicate=1 (it is {replicas})"
        raise ValueError(
            f"a batch of {rows} rows (train.batch_tokens / data.length) does not divide among {mesh.world.size} "
            f"processes{together}: {advice}, or change train.batch_tokens"
        )
    return rows // size
