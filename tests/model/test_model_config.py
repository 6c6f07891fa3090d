"""Model settings: defaults that follow from others, and one sentence per problem."""

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from model.config import ModelConfig, ScheduleConfig, TransformerConfig


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
        ({"t_min": 1.0}, ["schedule.t_min=1.0", "[0, 1)"]),
        ({"t_min": -0.1}, ["schedule.t_min=-0.1", "[0, 1)"]),
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
