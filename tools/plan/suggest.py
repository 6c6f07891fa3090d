"""What to change where a run does not fit: the settings that save memory, one after the other, each planned itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from pretrain.config import RunConfig

from .estimate import Plan

Planner = Callable[[RunConfig], Plan]


def suggestions(config: RunConfig, plan: Planner) -> list[str]:
    """Lines for a run that does not fit: each adds one setting to those before, down to one that fits."""
    lines = []
    for settings, smaller in _smaller(config):
        try:
            found = plan(smaller)
        except ValueError:
            continue
        verdict = "fits" if found.fits else "does not fit yet"
        host = f" and {found.trace.host / 2**30:.1f} GiB on the host" if found.trace.host else ""
        lines.append(f"{' '.join(settings)}: {found.peak / 2**30:.1f} GiB{host}, {verdict}")
        if found.fits:
            return lines
    tried = "none of these settings is enough" if lines else "no setting that saves memory applies here"
    return [*lines, f"{tried}: take more GPUs, or GPUs with more memory"]


def _smaller(config: RunConfig) -> Iterator[tuple[list[str], RunConfig]]:
    """Less and less memory for activations, then for weights, and at last none on the GPU for those of a shard."""
    settings: list[str] = []
    if config.train.recompute != "full":
        config = replace(config, train=replace(config.train, recompute="full"))
        settings = [*settings, "train.recompute=full"]
        yield settings, config
    length, micro = config.data.length, config.train.micro_batch_tokens or config.train.batch_tokens
    activations = settings
    while micro > length:
        micro = max(length, micro // 4 // length * length)
        config = replace(config, train=replace(config.train, micro_batch_tokens=micro))
        settings = [*activations, f"train.micro_batch_tokens={micro}"]
        yield settings, config
    parallel = config.parallel
    if parallel.replicate > 1:
        parallel = replace(parallel, replicate=1)
        settings = [*settings, "parallel.replicate=1"]
        yield settings, replace(config, parallel=parallel)
    for tensor in (2, 4, 8):
        if tensor > parallel.tensor:
            divided = replace(parallel, tensor=tensor)
            yield [*settings, f"parallel.tensor={tensor}"], replace(config, parallel=divided)
    if not parallel.offload:
        yield [*settings, "parallel.offload=true"], replace(config, parallel=replace(parallel, offload=True))
