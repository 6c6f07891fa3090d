"""What to change where a run does not fit: the settings that save memory, one after the other, each planned itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from pretrain.config import RunConfig

from .estimate import Plan

Planner = Callable[[RunConfig], Plan]


def suggestions(config: RunConfig, plan: Planner) -> list[str]:
    """Lines for a run that does not fit: each adds one setting to those before, down to one that fits."""
    lines, settings = [], []
    for setting, smaller in _smaller(config):
        settings.append(setting)
        try:
            found = plan(smaller)
        except ValueError:
            settings.pop()
            continue
        verdict = "fits" if found.fits else "does not fit yet"
        lines.append(f"{' '.join(settings)}: {found.peak / 2**30:.1f} GiB, {verdict}")
        if found.fits:
            return lines
    return [*lines, "none of these settings is enough: take more GPUs, or GPUs with more memory"]


def _smaller(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Less and less memory for activations, then for weights."""
    if config.train.recompute != "full":
        config = replace(config, train=replace(config.train, recompute="full"))
        yield "train.recompute=full", config
    length, micro = config.data.length, config.train.micro_batch_tokens or config.train.batch_tokens
    while micro > length:
        micro = max(length, micro // 4 // length * length)
        config = replace(config, train=replace(config.train, micro_batch_tokens=micro))
        yield f"train.micro_batch_tokens={micro}", config
    if config.parallel.replicate > 1:
        config = replace(config, parallel=replace(config.parallel, replicate=1))
        yield "parallel.replicate=1", config
    for tensor in (2, 4, 8):
        if tensor > config.parallel.tensor:
            yield (
                f"parallel.tensor={tensor}",
                replace(config, parallel=replace(config.parallel, tensor=tensor)),
            )
