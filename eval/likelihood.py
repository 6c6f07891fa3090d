"""What a checkpoint says about -log p of held-out rows, with as many draws of the noise as wanted.

Shapes: B sequences, D draws of the noise.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_pipeline.packing import Source
from model.batch import Batch
from model.bounds import Bound, BoundSums, delbo, nelbo, nelbo_kept, nll_discrete
from model.corruption import corrupt_uniform_count
from model.diffusion import MaskedDiffusion, StepSchedule
from model.noise import NoiseKey
from model.step_bound import Estimate, nelbo_steps

KINDS = ("nelbo", "nelbo_steps", "nelbo_kept", "delbo", "nll_discrete")

Loss = Callable[[Batch, NoiseKey], Tensor]
"""Nats of each sequence [B], one draw."""


def bound(
    model: MaskedDiffusion,
    source: Source,
    *,
    num_sequences: int | None = None,
    num_draws: int = 1,
    batch_size: int = 16,
    seed: int = 0,
) -> Bound:
    """What the training loss estimates, without its t_min, in nats per maskable token over the first rows of a source.

    Args:
        num_sequences: rows to measure; None: all.
        num_draws: corruptions of each row, whose losses are averaged before rows are added up.
        batch_size: rows at once, which changes no result.
    """

    def loss(batch: Batch, key: NoiseKey) -> Tensor:
        return model(batch, corrupt_uniform_count(batch, key, model.config), step=StepSchedule()).loss_B

    return _average(model, loss, source, num_sequences, num_draws, batch_size, seed).estimate(model.config.objective)


def estimate(
    model: MaskedDiffusion,
    source: Source,
    kind: str,
    *,
    num_latents: int = 1,
    num_steps: int = 1,
    num_hints: int = 1,
    z0: Estimate = "hard",
    num_sequences: int | None = None,
    num_draws: int = 1,
    batch_size: int = 16,
    seed: int = 0,
) -> Bound:
    """A named bound, or what the papers print in its place, in nats per maskable token; see model.bounds.

    The error counts rows as independent. A kind says which sampler it means: `nelbo_steps[T]`, with hints
    `nelbo_steps[T]_soft` or `_hard`.

    Args:
        num_latents: samples of z inside the logarithm (nelbo, nelbo_steps, delbo); more are tighter.
        num_steps: steps of the sampler (nelbo_steps).
        num_hints: hints that the sampler averages over (nelbo_steps).
        z0: how the sampler estimates z0 from its prediction (nelbo_steps).

    Raises:
        ValueError: an unknown kind, or one that this model has not.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a bound: use one of {', '.join(KINDS)}")
    losses: dict[str, Callable[..., Tensor]] = {
        "nelbo": partial(nelbo, num_latents=num_latents),
        "nelbo_steps": partial(nelbo_steps, num_steps=num_steps, num_latents=num_latents, num_hints=num_hints, z0=z0),
        "nelbo_kept": nelbo_kept,
        "delbo": partial(delbo, num_latents=num_latents),
        "nll_discrete": nll_discrete,
    }
    label = kind
    if kind == "nelbo_steps":
        label = f"nelbo_steps[{num_steps}]" + ("" if model.augmentation is None else f"_{z0}")
    loss = partial(losses[kind], model)
    return _average(model, loss, source, num_sequences, num_draws, batch_size, seed).estimate(label)


@torch.inference_mode()
def _average(
    model: MaskedDiffusion,
    loss: Loss,
    source: Source,
    num_sequences: int | None,
    num_draws: int,
    batch_size: int,
    seed: int,
) -> BoundSums:
    device = next(model.parameters()).device
    model.eval()
    total = len(source) if num_sequences is None else min(num_sequences, len(source))
    sums = BoundSums()
    for start in range(0, total, batch_size):
        index_B = torch.arange(start, min(total, start + batch_size))
        batch = Batch.of({**source.gather(np.asarray(index_B)), "index": index_B}).to(device)
        loss_DB = torch.stack([loss(batch, NoiseKey(seed, draw, batch.index_B)).double() for draw in range(num_draws)])
        sums.add(loss_DB.mean(0), batch.maskable_BL.sum(1))
    return sums
