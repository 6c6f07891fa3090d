import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from model.masks import Annealing
from pretrain.config import OptimConfig, RunConfig
from pretrain.schedules import learning_rate, step_schedule
from pretrain.settings import validate
from pretrain.trainer import averaging_decay

OPENING = ["train.attention_anneal=window", "train.attention_anneal_steps=4"]


def rates(steps: int, **settings: object) -> list[float]:
    return [learning_rate(step, OptimConfig(**settings), steps) for step in range(steps)]  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_warmup_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    found = rates(50, lr=2.0, warmup_steps=10, schedule=schedule)
    assert found[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert found[10] == pytest.approx(2.0)
    assert rates(5, lr=2.0, warmup_steps=0, schedule=schedule)[0] == pytest.approx(2.0)


def test_constant_stays() -> None:
    assert set(rates(50, lr=0.3, warmup_steps=10, schedule="constant")[10:]) == {0.3}


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_against_the_closed_form(floor: float) -> None:
    found = rates(110, lr=1.0, warmup_steps=10, schedule="cosine", min_lr_ratio=floor)
    for step in range(10, 110):
        plain = floor + (1 - floor) * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert found[step] == pytest.approx(plain, abs=1e-15)
    assert found[60] == pytest.approx((1 + floor) / 2)


def test_wsd_is_flat_and_then_linear_to_the_floor() -> None:
    found = rates(100, lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.1)
    assert found[10:80] == [1.0] * 70
    assert [found[n] - found[n + 1] for n in range(80, 99)] == pytest.approx([0.9 / 20] * 19)
    assert found[99] == pytest.approx(0.1 + 0.9 / 20)


def test_short_runs_are_defined() -> None:
    for schedule in ("constant", "cosine", "wsd"):
        assert all(math.isfinite(x) and x >= 0 for x in rates(3, lr=1.0, warmup_steps=10, schedule=schedule))
        assert rates(1, lr=1.0, warmup_steps=0, schedule=schedule, decay_fraction=0.0) == [1.0]


def test_young_averages_forget_faster() -> None:
    decays = [averaging_decay(0.99, step) for step in range(2000)]
    assert decays[0] == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_the_kl_weight_grows_linearly_and_stays(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(tmp_path, "train.kl_weight=4", "train.kl_anneal_steps=8", "train.steps=20")
    weights = [step_schedule(step, config).kl_weight for step in range(20)]
    assert weights == pytest.approx([0.5 * n for n in range(1, 9)] + [4.0] * 12)
    held = make_config(tmp_path, "train.kl_weight=4", "train.kl_anneal_steps=8", "train.kl_hold_steps=5")
    weights = [step_schedule(step, held).kl_weight for step in range(20)]
    assert weights == pytest.approx([0.5] * 5 + [0.5 * n for n in range(1, 9)] + [4.0] * 7)
    plain = make_config(tmp_path, "train.kl_weight=0.25")
    assert {step_schedule(step, plain).kl_weight for step in range(12)} == {0.25}


def test_statistics_are_taken_where_a_line_is_written(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(tmp_path, "log.every=5")
    assert [step + 1 for step in range(12) if step_schedule(step, config).statistics] == [5, 10, 12]


def test_attention_opens_linearly_and_by_the_step_alone(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    """Skipped batches do not count, as for the KL; another seed draws another pattern."""
    overrides = ("train.attention_anneal=bernoulli", "train.attention_anneal_steps=4")
    config = make_config(tmp_path, *overrides)
    found = [step_schedule(step, config).annealing for step in range(6)]
    assert [None if each is None else each.ratio for each in found] == [0.25, 0.5, 0.75, None, None, None]
    assert len({each.key for each in found if each is not None}) == 3
    assert step_schedule(7, config, passed_over=5).annealing == found[2]
    other = step_schedule(0, make_config(tmp_path, *overrides, "seed=1")).annealing
    assert found[0] is not None
    assert other is not None
    assert other.key != found[0].key
    window = make_config(tmp_path, "train.attention_anneal=window", "train.attention_anneal_steps=2")
    assert step_schedule(0, window).annealing == Annealing(0.5)
    assert step_schedule(0, make_config(tmp_path)).annealing is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.attention_anneal_steps=4"], "has no use with train.attention_anneal=at_once: set"),
        (
            [*OPENING, "train.steps=3"],
            "of 1 to train.steps=3, at whose end attention has opened, such as a tenth; it is 4",
        ),
        (["train.attention_anneal=window"], "needs train.attention_anneal_steps of 1 to train.steps=1000"),
        ([*OPENING, "model.block_size=8"], "does not go with model.block_size=8, whose attention is causal by blocks"),
        ([*OPENING, "model.autoregressive=true"], "whose attention stays causal"),
        ([*OPENING, "train.attention=flash"], "which has no such mask (flex and sdpa do)"),
        ([*OPENING, "model.backbone.kind=point_mlp"], "does not go with a backbone without attention"),
    ],
)
def test_attention_that_can_not_open_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        validate({"name": "refused", "data": {"kind": "shards", "path": "", "length": 32}}, overrides)
