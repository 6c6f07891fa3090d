"""The bound of a checkpoint on held-out rows, with as many draws of the noise as wanted.

Shapes: B sequences.
"""

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
    """Nats per maskable token over the first rows of a source; the error counts rows as independent.

    Args:
        num_sequences: rows to measure; None: all.
        num_draws: corruptions of each row, whose losses are averaged before rows are added up.
    """
    device = next(model.parameters()).device
    model.eval()
    total = len(source) if num_sequences is None else min(num_sequences, len(source))
    sums = BoundSums()
    for start in range(0, total, batch_size):
        index_B = torch.arange(start, min(total, start + batch_size))
        batch = Batch.of({**source.gather(np.asarray(index_B)), "index": index_B})
        loss_B = torch.zeros(len(index_B), dtype=torch.float64)
        for draw in range(num_draws):
            corruption = corrupt_uniform_count(batch, NoiseKey(seed, draw, index_B), model.config)
            terms = model(batch.to(device), corruption.to(device), step=StepSchedule())
            loss_B += terms.loss_B.double().cpu()
        sums.add(loss_B / num_draws, batch.maskable_BL.sum(1))
    return sums.estimate()
