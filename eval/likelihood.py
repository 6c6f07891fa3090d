"""The bound of a checkpoint on held-out rows, with as many draws of the noise as wanted."""

import numpy as np
import torch

from data_pipeline.packing import Source
from model.batch import Batch
from model.bounds import Bound, BoundSums
from model.corruption import corrupt_uniform_count
from model.diffusion import MaskedDiffusion, StepSchedule
from model.noise import NoiseKey


@torch.inference_mode()
def bound(
    model: MaskedDiffusion,
    source: Source,
    *,
    num_sequences: int | None = None,
    num_draws: int = 1,
    batch_size: int = 16,
    seed: int = 0,
) -> Bound:
    """Nats per maskable token over the first rows of a source; the error counts rows and draws as independent.

    Args:
        num_sequences: rows to measure; None: all.
        num_draws: corruptions of each row.
    """
    model.eval()
    total = len(source) if num_sequences is None else min(num_sequences, len(source))
    sums = BoundSums()
    for draw in range(num_draws):
        for start in range(0, total, batch_size):
            index = torch.arange(start, min(total, start + batch_size))
            batch = Batch.of({**source.gather(np.asarray(index)), "index": index})
            corruption = corrupt_uniform_count(batch, NoiseKey(seed, draw, index), model.config)
            terms = model(batch, corruption, step=StepSchedule())
            sums.add(terms.loss_B, batch.maskable_BL.sum(1))
    return sums.estimate()
