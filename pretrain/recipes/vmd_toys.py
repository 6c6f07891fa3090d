"""The controlled experiments of VMD (Sections 4.1 and 4.2, Appendices C.1 and D.2): tokens that depend on each other.

Readings where the paper contradicts itself or leaves something open (docs/errata.md):
- The KL weight is 1, annealed over the first half. At the 4.0 that C.1 gives for uniform data, normalised as in Eq. 6,
  the collapsed model is the optimum; without annealing the latent collapses on the way.
- A learned position table: with rotary positions alone a fully masked input is the same at every position, and no
  model could write two different tokens in one step.
- The four-token runs without blocks and the needle are `mdm` and `vmd`; `..._blocks` have two blocks of two tokens.
"""

from dataclasses import replace

from model.config import LatentConfig, ModelConfig, RecognitionConfig, ScheduleConfig, TransformerConfig
from model.size import matched_control

from ..config import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from ..data_config import PatternData
from . import Family

DIGITS = {"vocab_size": 13, "mask_id": 10}


def two_token_deterministic() -> Family:
    """Two tokens, the second one more than the first (VMD Table 1)."""
    return _systems(PatternData(toy="deterministic"))


def two_token_non_uniform() -> Family:
    """Two tokens, the second one more than the first, which is k with probability (k+1)/55 (VMD Table 1)."""
    return _systems(PatternData(toy="non_uniform"))


def two_token_dependence() -> Family:
    """Two tokens, the second one more than the first with probability data.dependence, else another (VMD Figure 2)."""
    return _systems(PatternData(toy="dependence", dependence=0.8))


def four_token_d1() -> Family:
    """Four tokens that count upwards (VMD Table 2, D1)."""
    return _with_blocks(PatternData(toy="d1", length=4))


def four_token_d2() -> Family:
    """Two independent pairs that count upwards (VMD Table 2, D2)."""
    return _with_blocks(PatternData(toy="d2", length=4))


def needle_20() -> Family:
    """The same four tokens at both ends of twenty (VMD Table 6)."""
    return _needle(20)


def needle_30() -> Family:
    """The same four tokens at both ends of thirty (VMD Table 6)."""
    return _needle(30)


def needle_40() -> Family:
    """The same four tokens at both ends of forty, where the paper's model fails (VMD Table 6)."""
    return _needle(40)


def _systems(data: PatternData, *, pool: str = "mean", **model: object) -> Family:
    """The baseline, VMD, and a baseline with as many parameters as VMD with its encoder."""
    backbone = TransformerConfig(dim=64, num_layers=8, num_heads=2, max_positions=data.length)
    recognition = RecognitionConfig(num_layers=2, pool=pool)  # type: ignore[arg-type]
    mdm = ModelConfig(backbone=backbone, **DIGITS, **model)  # type: ignore[arg-type]
    vmd = replace(
        mdm,
        backbone=replace(backbone, condition_dim=64),
        latent=LatentConfig(dim=32, recognition=recognition),
    )
    return {
        "mdm": _run(data, mdm),
        "vmd": _run(data, vmd, kl_anneal_steps=1000),
        "mdm_matched": _run(data, matched_control(vmd)),
    }


def _with_blocks(data: PatternData) -> Family:
    blocks = {f"{system}_blocks": run for system, run in _systems(data, block_size=2).items()}
    return _systems(data) | blocks


def _needle(length: int) -> Family:
    """Gated pooling finds the needle; times are drawn nearer to 1, where all ends are hidden, and count the same."""
    schedule = ScheduleConfig(kind="polynomial", power=0.5 if length <= 20 else 0.3)
    data = PatternData(toy="needle", length=length)
    return _systems(data, pool="gated", schedule=schedule, loss_weight="uniform")


def _run(data: PatternData, model: ModelConfig, **train: int) -> RunConfig:
    return RunConfig(
        name="vmd_toy",
        data=data,
        model=model,
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0, beta2=0.999, weight_decay=0.0),
        train=TrainConfig(steps=2000, batch_tokens=10_000 * data.length, **train),  # type: ignore[arg-type]
        validation=ValidationConfig(every=500, num_sequences=512),
        checkpoint=CheckpointConfig(every=250, keep=1),
        log=LogConfig(every=25),
    )
