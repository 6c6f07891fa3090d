"""Quantities that follow the step: the learning rate, and what the model needs to know of it."""

import math

from model.diffusion import StepSchedule
from model.masks import Annealing
from model.noise import step_key

from .config import OptimConfig, RunConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Rate of the step (counted from 0): linear warm-up, then constant, cosine or WSD."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        shape = min(1.0, max(0.0, (total_steps - step) / decay_steps))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape)


def step_schedule(position: int, config: RunConfig, passed_over: int = 0) -> StepSchedule:
    """What the model is told about the step (counted from 0) that takes the batch at a position in the data order.

    passed_over: batches before it that no step takes.
    """
    step, train = position - passed_over, config.train
    risen = max(1, step + 1 - train.kl_hold_steps)
    annealed = min(1.0, risen / train.kl_anneal_steps) if train.kl_anneal_steps else 1.0
    logged = (step + 1) % config.log.every == 0 or step + 1 == train.steps
    return StepSchedule(train.kl_weight * annealed, attention_annealing(step, config), logged)


def attention_annealing(step: int, config: RunConfig) -> Annealing | None:
    """How far attention has opened at the step (counted from 0), linearly; None where it sees everything."""
    ratio = (step + 1) / max(1, config.train.attention_anneal_steps)
    if config.train.attention_anneal == "at_once" or ratio >= 1:
        return None
    drawn = config.train.attention_anneal == "bernoulli"
    return Annealing(ratio, step_key(config.seed, step, "attention") if drawn else None)


def averaging_decay(decay: float, step: int) -> float:
    """Young averages forget faster: (1 + step) / (10 + step), up to the decay asked for."""
    return min(decay, (1 + step) / (10 + step))
