"""Engines by name; what one needs beyond PyTorch is imported with it."""

from model.config import ModelConfig

from ..config import RunConfig
from ..parallel.mesh import Mesh
from .base import Engine


def make_engine(config: RunConfig, model: ModelConfig, mesh: Mesh) -> Engine:
    """The engine that a run asks for, with its model built and initialised."""
    settings = (model, config.optim, config.train, config.parallel, mesh)
    if config.engine == "deepspeed":
        from .deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(*settings, seed=config.seed)
    from .fsdp import FsdpEngine

    return FsdpEngine(*settings, seed=config.seed)
