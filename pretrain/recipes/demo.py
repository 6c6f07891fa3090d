"""A small diffusion coder on the interpreter's own standard library: minutes on a laptop."""

from model.config import ModelConfig, TransformerConfig

from ..config import (
    CheckpointConfig,
    OptimConfig,
    PrepareConfig,
    RunConfig,
    ShardData,
    TrainConfig,
    ValidationConfig,
)


def demo() -> RunConfig:
    """A 4M-parameter DiT on the standard library's source, two minutes on two cores."""
    return RunConfig(
        name="demo",
        data=ShardData(
            path="data/stdlib",
            length=256,
            prepare=PrepareConfig(source="stdlib", tokenizer="bpe:4096"),
        ),
        model=ModelConfig(backbone=TransformerConfig(dim=192, num_layers=6, num_heads=6, tie_embeddings=True)),
        optim=OptimConfig(lr=2e-3, warmup_steps=40, weight_decay=0.05),
        train=TrainConfig(steps=400, batch_tokens=4096, precision="bf16", ema_decay=0.99),
        validation=ValidationConfig(every=100, num_sequences=64),
        checkpoint=CheckpointConfig(every=100),
    )
