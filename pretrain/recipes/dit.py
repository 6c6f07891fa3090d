"""The MDLM backbone at GPT-2 small scale, for text tokenised with `penumbra tokenize`."""

from model.config import ModelConfig, TransformerConfig

from ..config import CheckpointConfig, OptimConfig, RunConfig, ShardData, TrainConfig, ValidationConfig


def dit_small() -> RunConfig:
    """A 12-layer x 768 DiT on your own shards in data/text, the settings of MDLM on OpenWebText."""
    return RunConfig(
        name="dit_small",
        data=ShardData(path="data/text", length=1024, num_workers=2),
        model=ModelConfig(backbone=TransformerConfig(dim=768, num_layers=12, num_heads=12, dropout=0.1)),
        optim=OptimConfig(lr=3e-4, schedule="constant", warmup_steps=2500, beta2=0.999, weight_decay=0.0),
        train=TrainConfig(
            steps=1_000_000,
            batch_tokens=524_288,
            micro_batch_tokens=32_768,
            precision="bf16",
            ema_decay=0.9999,
        ),
        validation=ValidationConfig(every=10_000, num_sequences=1024),
        checkpoint=CheckpointConfig(every=10_000, keep=3),
    )
