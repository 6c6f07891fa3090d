"""The 2D examples of VADD (Section 5.1, Appendix B.1): multimodal points whose two dimensions depend on each other.

Readings (docs/errata.md): one table and one output layer per dimension, without which the two could not hear each
other; the checkerboard is uniform on two diagonal quadrants. 500 epochs of 100,000 points in batches of 256.
"""

from dataclasses import replace
from typing import Literal

from model.config import LatentConfig, ModelConfig, PointMlpConfig
from model.size import matched_control

from ..config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import PointData
from . import Family

STEPS_PER_EPOCH = 100_000 // 256


def toy2d_checkerboard() -> Family:
    """Points of two diagonal squares in 100 x 100 bins (VADD Table 1)."""
    return _systems("checkerboard")


def toy2d_swissroll() -> Family:
    """Points of a rolled-up sheet seen from the side in 100 x 100 bins (VADD Table 1)."""
    return _systems("swissroll")


def toy2d_circles() -> Family:
    """Points of two concentric circles in 100 x 100 bins (VADD Table 1)."""
    return _systems("circles")


def _systems(toy: Literal["checkerboard", "swissroll", "circles"]) -> Family:
    mdlm = ModelConfig(backbone=PointMlpConfig(), time_conditioning=True, vocab_size=103, mask_id=100)
    vadd = replace(mdlm, latent=LatentConfig(dim=2, inject="embedding"))
    return {
        "mdlm": _run(toy, mdlm),
        "vadd": _run(toy, vadd, kl_anneal_steps=100 * STEPS_PER_EPOCH),
        "mdlm_matched": _run(toy, matched_control(vadd)),
    }


def _run(toy: Literal["checkerboard", "swissroll", "circles"], model: ModelConfig, **train: int) -> RunConfig:
    return RunConfig(
        name="toy2d",
        data=PointData(toy=toy),
        model=model,
        optim=OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=0, beta2=0.999, weight_decay=0.0),
        train=TrainConfig(steps=500 * STEPS_PER_EPOCH, batch_tokens=512, clip_norm=1e9, **train),  # type: ignore[arg-type]
        validation=ValidationConfig(every=10 * STEPS_PER_EPOCH, num_sequences=2000),
        checkpoint=CheckpointConfig(every=10 * STEPS_PER_EPOCH, keep=1),
        log=LogConfig(every=100),
    )
