"""A small diffusion coder on the interpreter's own standard library: minutes on a laptop."""

from model.config import ModelConfig, TransformerConfig

from ..config import CheckpointConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import PrepareConfig, ShardData


def demo() -> RunConfig:
    """A 0.9M-parameter DiT on the bytes of the standard library's source, three minutes on two cores."""
    return RunConfig(
        name="demo",
        data=ShardData(
            path="data/stdlib",
            length=256,
            prepare=PrepareConfig(source="stdlib", tokenizer="bytes"),
        ),
        model=ModelConfig(backbone=TransformerConfig(dim=128, num_layers=4, num_heads=4)),
        optim=OptimConfig(lr=3e-3, warmup_steps=40, weight_decay=0.05),
        train=TrainConfig(steps=900, batch_tokens=4096, ema_decay=0.99),
        validation=ValidationConfig(every=100, num_sequences=64),
        checkpoint=CheckpointConfig(every=100),
    )
