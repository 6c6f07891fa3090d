"""Engines by name; what one needs beyond PyTorch is imported with it."""

from model.config import ModelConfig

from ..config import RunConfig
from ..parallel.mesh import Mesh
from .base import Engine


def make_engine(config: RunConfig, model: ModelConfig, mesh: Mesh) -> Engine:
    """The engine that a run asks for, with its model built and initialised.

    Raises:
        ValueError: the engine's package is not installed, or it can not do what is asked.
    """
    if config.engine == "megatron":
        return _megatron(config, model, mesh)
    settings = (model, config.optim, config.train, config.parallel, mesh)
    if config.engine == "deepspeed":
        from .deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(*settings, seed=config.seed)
    from .fsdp import FsdpEngine

    return FsdpEngine(*settings, seed=config.seed)


def _megatron(config: RunConfig, model: ModelConfig, mesh: Mesh) -> Engine:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about packages that it can do without
            from .megatron import MegatronEngine
    except ModuleNotFoundError as error:
        raise ValueError(
            f"engine=megatron needs megatron-core ({error}): pip install penumbra-diffusion[megatron], or engine=fsdp"
        ) from None
    return MegatronEngine(model, config.optim, config.train, mesh, seed=config.seed)
