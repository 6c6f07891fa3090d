"""Small Python functions whose docstrings determine them: pass@1 that moves in minutes."""

from model.config import ModelConfig, TransformerConfig

from ..config import CheckpointConfig, OptimConfig, RunConfig, ToyFunctionsData, TrainConfig, ValidationConfig


def toy_functions() -> RunConfig:
    """A 3M-parameter DiT that writes function bodies from docstrings, under eight minutes on two cores."""
    return RunConfig(
        name="toy_functions",
        data=ToyFunctionsData(),
        model=ModelConfig(backbone=TransformerConfig(dim=192, num_layers=6, num_heads=6, tie_embeddings=True)),
        optim=OptimConfig(lr=2e-3, warmup_steps=100, weight_decay=0.05),
        train=TrainConfig(steps=2000, batch_tokens=6144, precision="bf16", ema_decay=0.995),
        validation=ValidationConfig(every=500, num_sequences=128),
        checkpoint=CheckpointConfig(every=500),
    )
