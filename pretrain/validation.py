"""The bound on held-out rows, as training measures it."""

import math
from collections.abc import Callable

import torch

from model.batch import Batch
from model.bounds import Bound, BoundSums
from model.config import ModelConfig
from model.corruption import corrupt_uniform_count
from model.diffusion import StepSchedule
from model.noise import NoiseKey

from .config import RunConfig
from .data import Data
from .engines.base import Engine, Micro


def validation_bound(
    engine: Engine, data: Data, model: ModelConfig, config: RunConfig, *, between: Callable[[], object] = lambda: None
) -> Bound:
    """The bound on the first held-out rows, with the same noise every time, divided among the ranks.

    between: called before every batch, on every rank as often; what it raises ends the validation.
    """
    sums = BoundSums()
    axis, length = engine.mesh.data, config.data.length
    source = data.validation
    wanted = min(config.validation.num_sequences, len(source)) if source is not None and config.validation.every else 0
    indices = torch.arange(wanted)[axis.rank :: axis.size]
    rows_at_once = max(1, (config.train.micro_batch_tokens or config.train.batch_tokens // axis.size) // length)
    num_rounds = math.ceil(math.ceil(wanted / axis.size) / rows_at_once)
    with engine.ema():
        for index_B in torch.tensor_split(indices, num_rounds) if num_rounds else ():
            between()
            assert source is not None
            filled = index_B if index_B.numel() else torch.zeros(1, dtype=torch.int64)
            batch = Batch.of({**source.gather(filled.numpy()), "index": filled})
            corruption = corrupt_uniform_count(batch, NoiseKey(config.seed, 0, filled), model)
            terms = engine.evaluate(Micro(batch, corruption, StepSchedule()))
            if index_B.numel():
                sums.add(terms.loss_B, batch.maskable_BL.sum(1))
    return BoundSums(*axis.all_reduce(sums.as_list())).estimate(model.objective)
