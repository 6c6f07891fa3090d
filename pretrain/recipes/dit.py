"""The diffusion transformers of MDLM in two sizes, with a latent or with hints; text8, lm1b and owt train them.

Readings: rotary positions alone and no time, as in MDLM. Its code carries adaLN layers of width 128 that hear a
constant; ours are there only where a latent is heard. So a plain model is smaller by them (162M for the 169M of CADD
Appendix B.3, with GPT-2's vocabulary and a head of its own), and a latent costs the 6% of VADD Section 5.3.
"""

from dataclasses import replace

from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig

from ..config import CheckpointConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import ShardData

SMALL = TransformerConfig(dim=768, num_layers=12, num_heads=12, dropout=0.1)
TINY = TransformerConfig(dim=512, num_layers=8, num_heads=8, dropout=0.1)


def dit_small() -> RunConfig:
    """A 12-layer x 768 DiT on your own shards in data/text, the settings of MDLM on OpenWebText."""
    return RunConfig(
        name="dit_small",
        data=ShardData(path="data/text", length=1024, num_workers=2),
        model=ModelConfig(backbone=SMALL),
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


def with_latent(
    backbone: TransformerConfig, dim: int, *, recognition_layers: int | None = None, block_size: int = 0
) -> ModelConfig:
    """A latent of width `dim` per sequence or block, heard by adaLN of width 128 (VADD, VMD)."""
    return ModelConfig(
        backbone=replace(backbone, condition_dim=128),
        latent=LatentConfig(dim=dim, recognition=RecognitionConfig(num_layers=recognition_layers)),
        block_size=block_size,
    )


def with_hints(backbone: TransformerConfig, *, gated: bool = False) -> ModelConfig:
    """Hints added to the mask's embedding, trained by the unweighted cross-entropy of CADD Eq. 20."""
    return ModelConfig(backbone=backbone, augmentation=AugmentationConfig(gated=gated), loss_weight="uniform")
