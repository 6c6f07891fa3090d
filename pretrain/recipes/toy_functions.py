"""Small Python functions whose docstrings determine them: pass@1 that moves in minutes."""

from model.config import ModelConfig, TransformerConfig

from ..config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import ToyFunctionsData


def toy_functions() -> RunConfig:
    """A 1M-parameter DiT that writes function bodies from docstrings, under eight minutes on two cores."""
    return RunConfig(
        name="toy_functions",
        data=ToyFunctionsData(),
        model=ModelConfig(backbone=TransformerConfig(dim=128, num_layers=4, num_heads=4)),
        optim=OptimConfig(lr=3e-3, warmup_steps=100, beta2=0.98, weight_decay=0.05),
        train=TrainConfig(steps=4000, batch_tokens=3072, precision="bf16", ema_decay=0.995),
        validation=ValidationConfig(every=500, num_sequences=128),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=20),
    )
