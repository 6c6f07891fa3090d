"""What makes a run the same run, on however many processes."""

from .config import RunConfig
from .data import Data


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


def rows_per_rank(config: RunConfig, size: int) -> int:
    """Rows of the batch that each of `size` ranks takes.

    Raises:
        ValueError: they do not divide among them.
    """
    rows = config.batch_rows
    if rows % size:
        legal = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(
            f"a batch of {rows} rows (train.batch_tokens / data.length) does not divide among {size} processes: "
            f"use one of {legal} processes, or change train.batch_tokens"
        )
    return rows // size
