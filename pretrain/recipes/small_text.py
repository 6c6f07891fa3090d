"""Text and code of the interpreter's standard library in short rows: hints, their ablations, and a judge, in minutes.

A reading: CADD writes OpenWebText in rows of 1,024 GPT-2 tokens; here pairs of bytes are merged to 1,024 tokens, rows
have 64, and generative perplexity is that of the autoregressive model trained on the same rows.
"""

from model.config import ModelConfig, TransformerConfig

from ..config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import PrepareConfig, ShardData
from . import Family
from .dit import with_hints


def small_text() -> Family:
    """The standard library's source in rows of 64 tokens, a DiT of 4 layers x 128 (CADD Tables 8 to 10 and 12)."""
    backbone = TransformerConfig(dim=128, num_layers=4, num_heads=4)
    return {
        "ar": _run(ModelConfig(backbone=backbone, autoregressive=True)),
        "mdlm": _run(ModelConfig(backbone=backbone)),
        "cadd": _run(with_hints(backbone)),
    }


def _run(model: ModelConfig) -> RunConfig:
    return RunConfig(
        name="small_text",
        data=ShardData(
            path="data/stdlib_bpe1024",
            length=64,
            prepare=PrepareConfig(source="stdlib", tokenizer="bpe:1024"),
        ),
        model=model,
        optim=OptimConfig(lr=3e-3, warmup_steps=100, weight_decay=0.05),
        train=TrainConfig(steps=6000, batch_tokens=4096, precision="bf16", ema_decay=0.99),
        validation=ValidationConfig(every=500, num_sequences=256),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=20),
    )
