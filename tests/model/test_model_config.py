"""Model settings: defaults that follow from others, and one sentence per problem."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from model.config import (
    AugmentationConfig,
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    ScheduleConfig,
    TransformerConfig,
)


def problems_of(**changes: Any) -> list[str]:
    backbone = {k: changes.pop(k) for k in list(changes) if k in TransformerConfig.__dataclass_fields__}
    schedule = {k: changes.pop(k) for k in list(changes) if k in ScheduleConfig.__dataclass_fields__}
    config = ModelConfig(backbone=TransformerConfig(**backbone), schedule=ScheduleConfig(**schedule), **changes)
    return list(config.problems())


def test_defaults_have_no_problems() -> None:
    assert problems_of() == []
    assert problems_of(vocab_size=10, mask_id=9) == []
    assert problems_of(condition_dim=8, time_conditioning=True) == []
    assert problems_of(num_heads=6, num_kv_heads=3, dim=192) == []
    assert problems_of(num_heads=3, head_dim=64) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dim": 0}, ["backbone.dim=0", "at least 1"]),
        ({"num_layers": 0}, ["backbone.num_layers=0", "at least 1"]),
        ({"num_heads": 0}, ["backbone.num_heads=0", "at least 1"]),
        ({"num_kv_heads": 0}, ["backbone.num_kv_heads=0", "at least 1"]),
        ({"num_kv_heads": -3}, ["backbone.num_kv_heads=-3", "at least 1"]),
        ({"head_dim": 0}, ["backbone.head_dim=0", "at least 1"]),
        ({"ffn_dim": 0}, ["backbone.ffn_dim=0", "at least 1"]),
        ({"rope_theta": 0.0}, ["backbone.rope_theta=0.0", "positive"]),
        ({"rope_theta": math.nan}, ["backbone.rope_theta=nan", "positive"]),
        ({"norm_eps": -1e-6}, ["backbone.norm_eps=-1e-06", "positive"]),
        ({"norm_eps": math.nan}, ["backbone.norm_eps=nan", "positive"]),
        ({"power": math.nan}, ["schedule.power=nan", "positive"]),
        ({"vocab_size": -1}, ["vocab_size=-1", "0 (as many as the tokenizer has)"]),
        ({"dim": 256, "num_heads": 6}, ["num_heads=6", "dim=256", "[1, 2, 4, 8, 16, 32, 64, 128]", "head_dim"]),
        ({"dim": 12, "num_heads": 4}, ["head_dim=3", "even"]),
        ({"num_heads": 4, "num_kv_heads": 3}, ["num_kv_heads=3", "num_heads=4", "[1, 2, 4]"]),
        ({"num_heads": 4, "num_kv_heads": 8}, ["num_kv_heads=8", "num_heads=4", "[1, 2, 4]"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"dropout": -0.1}, ["dropout=-0.1", "[0, 1)"]),
        ({"condition_dim": -1, "time_conditioning": True}, ["condition_dim=-1", "0 (off) or positive"]),
        ({"time_conditioning": True}, ["time_conditioning=true", "backbone.condition_dim"]),
        ({"condition_dim": 8}, ["backbone.condition_dim=8", "time_conditioning=true"]),
        ({"t_min": 1.0}, ["schedule.t_min=1.0", "t_max=1.0", "0 <= t_min < t_max <= 1"]),
        ({"t_min": -0.1}, ["schedule.t_min=-0.1", "0 <= t_min < t_max <= 1"]),
        ({"t_min": math.nan}, ["schedule.t_min=nan", "0 <= t_min < t_max <= 1"]),
        ({"t_min": 0.4, "t_max": 0.3}, ["schedule.t_min=0.4", "t_max=0.3", "0 <= t_min < t_max <= 1"]),
        ({"t_max": 1.1}, ["t_max=1.1", "0 <= t_min < t_max <= 1"]),
        ({"max_positions": -1}, ["backbone.max_positions=-1", "0 (rotary positions alone) or positive"]),
        ({"power": 0.0}, ["schedule.power=0.0", "positive"]),
        ({"beta_min": 30.0}, ["schedule.beta_min=30.0", "beta_max=20.0"]),
        ({"beta_min": 0.0}, ["schedule.beta_min=0.0", "beta_max=20.0"]),
        ({"vocab_size": 10, "mask_id": 10}, ["mask_id=10", "vocab_size=10"]),
    ],
    ids=str,
)
def test_each_problem_is_one_sentence_with_name_value_and_fix(changes: dict[str, Any], parts: list[str]) -> None:
    found = problems_of(**changes)
    assert len(found) == 1
    assert all(part in found[0] for part in parts)
    assert "\n" not in found[0]


def test_all_problems_are_listed_at_once() -> None:
    found = problems_of(dropout=2.0, num_kv_heads=3, t_min=5.0, vocab_size=4, mask_id=4, time_conditioning=True)
    assert len(found) == 5


def test_widths_follow_from_each_other() -> None:
    assert TransformerConfig(dim=96, num_heads=3).head_width == 32
    assert TransformerConfig(dim=96, num_heads=3, head_dim=16).head_width == 16
    assert TransformerConfig(num_heads=3).kv_heads == 3
    assert TransformerConfig(num_heads=4, num_kv_heads=2).kv_heads == 2
    assert TransformerConfig(dim=100, ffn="gelu").ffn_width == 400
    assert TransformerConfig(dim=100, ffn="swiglu").ffn_width == 320  # 266.7 rounded up to 64
    assert TransformerConfig(dim=192, ffn="swiglu").ffn_width == 512  # 512 exactly
    assert TransformerConfig(ffn_dim=77).ffn_width == 77


def test_the_tokenizer_fills_what_was_left_open() -> None:
    filled = ModelConfig().with_vocabulary(1000, 999)
    assert (filled.vocab_size, filled.mask_id) == (1000, 999)
    padded = ModelConfig(vocab_size=1024).with_vocabulary(1000, 999)
    assert (padded.vocab_size, padded.mask_id) == (1024, 999)
    agreed = ModelConfig(vocab_size=1024, mask_id=3).with_vocabulary(1000, 3)
    assert (agreed.vocab_size, agreed.mask_id) == (1024, 3)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ModelConfig(vocab_size=900), "1000 tokens but model.vocab_size=900: set .* to 0 or to at least 1000"),
        (ModelConfig(mask_id=1000), "mask id is 999 but model.mask_id=1000: set model.mask_id=-1"),
        (ModelConfig(mask_id=0), "mask id is 999 but model.mask_id=0: set model.mask_id=-1"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(config: ModelConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config.with_vocabulary(1000, 999)


def test_a_backbone_says_first_what_it_is() -> None:
    first = fields(TransformerConfig)[0]
    assert (first.name, first.default) == ("kind", "transformer")


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ModelConfig().vocab_size = 3  # type: ignore[misc]


CONDITIONED = ModelConfig(backbone=TransformerConfig(condition_dim=8))
POINTS = ModelConfig(backbone=PointMlpConfig())


def latent(recognition: RecognitionConfig | None = None, **changes: Any) -> LatentConfig:
    return LatentConfig(recognition=recognition or RecognitionConfig(), **changes)


def hints(**changes: Any) -> ModelConfig:
    return ModelConfig(augmentation=AugmentationConfig(**changes))


def recognised(**changes: Any) -> ModelConfig:
    backbone = TransformerConfig(dim=16, num_heads=2)
    return ModelConfig(backbone=backbone, latent=latent(RecognitionConfig(**changes), inject="embedding"))


def test_the_switches_have_no_problems_as_they_are_meant() -> None:
    for config in (
        replace(CONDITIONED, latent=latent()),
        replace(CONDITIONED, latent=latent(), augmentation=AugmentationConfig(), block_size=4),
        replace(CONDITIONED, latent=latent(prior="earlier_blocks"), block_size=4),
        ModelConfig(latent=latent(inject="embedding", prior="x_t")),
        replace(CONDITIONED, latent=latent(inject="embedding"), time_conditioning=True),
        ModelConfig(autoregressive=True),
        replace(POINTS, time_conditioning=True, latent=latent(inject="embedding")),
        *(hints(fusion=fusion) for fusion in ("add", "concat", "reweight", "literal")),
        hints(gated=True, path="vp", scale="literal", z0="hard", mse_weight=0.5),
        recognised(dim=8, num_layers=1),
    ):
        assert list(config.problems()) == []


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (ModelConfig(block_size=-2), ["block_size=-2", "0 (the whole sequence) or positive"]),
        (ModelConfig(autoregressive=True, block_size=4), ["autoregressive=true", "so block_size", "turn one"]),
        (
            replace(CONDITIONED, autoregressive=True, latent=latent(), augmentation=AugmentationConfig()),
            ["autoregressive=true", "latent, augmentation", "turn one"],
        ),
        (replace(POINTS, block_size=1), ["backbone.kind=point_mlp", "block_size", "backbone.kind=transformer"]),
        (replace(POINTS, autoregressive=True), ["backbone.kind=point_mlp", "autoregressive", "set both off"]),
        (replace(POINTS, augmentation=AugmentationConfig()), ["augmentation", "backbone.kind=transformer"]),
        (replace(POINTS, latent=latent()), ["latent.inject=adaln", "point_mlp", "latent.inject=embedding"]),
        (replace(POINTS, latent=latent(inject="embedding", prior="x_t")), ["latent.prior=x_t", "latent.prior=normal"]),
        (ModelConfig(backbone=PointMlpConfig(num_dimensions=0)), ["backbone.num_dimensions=0", "at least 1"]),
        (ModelConfig(backbone=PointMlpConfig(dim=0)), ["backbone.dim=0", "at least 1"]),
        (ModelConfig(backbone=PointMlpConfig(num_layers=0)), ["backbone.num_layers=0", "at least 1"]),
        (replace(CONDITIONED, latent=latent(prior="earlier_blocks")), ["earlier_blocks needs blocks", "block_size"]),
        (ModelConfig(latent=latent()), ["latent.inject=adaln", "backbone.condition_dim", "latent.inject=embedding"]),
        (replace(CONDITIONED, latent=latent(inject="embedding")), ["backbone.condition_dim=8 has nothing to carry"]),
        (ModelConfig(latent=latent(inject="embedding", dim=0)), ["latent.dim=0", "at least 1"]),
        (ModelConfig(latent=latent(inject="embedding", prior_layers=0)), ["latent.prior_layers=0", "at least 1"]),
        (recognised(num_layers=0), ["latent.recognition.num_layers=0", "at least 1"]),
        (recognised(dim=0), ["latent.recognition.dim=0", "at least 1"]),
        (recognised(num_heads=-1), ["latent.recognition.num_heads=-1", "at least 1"]),
        (recognised(num_heads=5), ["latent.recognition.dim=16 in num_heads=5", "heads of width 3", "even"]),
        (recognised(dim=15), ["latent.recognition.dim=15 in num_heads=1", "heads of width 15", "even"]),
        (hints(hint_half_life=0.0), ["augmentation.hint_half_life=0.0", "(0, 1)"]),
        (hints(hint_half_life=1.0), ["augmentation.hint_half_life=1.0", "(0, 1)"]),
        (hints(hint_half_life=math.nan), ["augmentation.hint_half_life=nan", "(0, 1)"]),
        (hints(mse_weight=-0.1), ["augmentation.mse_weight=-0.1", "0 (off) or positive"]),
        (hints(mse_weight=math.nan), ["augmentation.mse_weight=nan", "0 (off) or positive"]),
        (hints(gated=True, fusion="concat"), ["augmentation.gated=true", "fusion=concat", "set gated=false"]),
    ],
    ids=str,
)
def test_each_switch_that_does_not_fit_is_one_sentence(config: ModelConfig, parts: list[str]) -> None:
    found = list(config.problems())
    assert len(found) == 1
    assert all(part in found[0] for part in parts)
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("config", "length", "parts"),
    [
        (ModelConfig(block_size=5), 12, ["block_size=5", "row length 12", "[1, 2, 3, 4, 6, 12]"]),
        (ModelConfig(block_size=24), 12, ["block_size=24", "row length 12"]),
        (ModelConfig(backbone=TransformerConfig(max_positions=11)), 12, ["max_positions=11", "at least", "12"]),
        (POINTS, 3, ["backbone.num_dimensions=2", "row length, 3"]),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(config: ModelConfig, length: int, parts: list[str]) -> None:
    (found,) = config.length_problems(length)
    assert all(part in found for part in parts)
    assert "\n" not in found


def test_rows_that_fit() -> None:
    for config in (ModelConfig(), ModelConfig(block_size=4), ModelConfig(block_size=12), ModelConfig(block_size=1)):
        assert list(config.length_problems(12)) == []
    assert list(ModelConfig(backbone=TransformerConfig(max_positions=12)).length_problems(12)) == []
    assert list(POINTS.length_problems(2)) == []
    assert [ModelConfig(block_size=size).num_segments(12) for size in (0, 1, 4, 12)] == [1, 12, 3, 1]


def test_only_plain_models_train_on_a_bound() -> None:
    assert ModelConfig().objective == ModelConfig(block_size=4).objective == "nelbo"
    assert ModelConfig(autoregressive=True).objective == "nelbo"
    assert replace(CONDITIONED, latent=latent()).objective == "delbo"
    assert hints().objective == replace(hints(), latent=latent(inject="embedding")).objective == "nll_discrete"
