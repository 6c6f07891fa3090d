"""Spikes: the same decision as plain arithmetic makes, and the same again after every resume."""

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.diffusion import LossTerms
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation
from pretrain.config import RunConfig, TrainConfig
from pretrain.endings import Ending
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.hooks.spikes import LEAST, MAX_ROLLBACKS, REMEMBERED, SpikeGuard
from pretrain.schedules import learning_rate
from pretrain.state import TrainState
from pretrain.train import train

MakeConfig = Callable[..., RunConfig]
Trace = dict[int, dict[str, Any]]
ReadTrace = Callable[[Path], Trace]
ROWS = 16
FACTOR = 4.0


def norms() -> list[float]:
    """Ordinary ones, spikes early and late, what is not finite, and a level that changes for good."""
    generator = torch.Generator().manual_seed(0)
    values = (1 + torch.rand(200, generator=generator)).tolist()
    values[3], values[60], values[61], values[90] = 50.0, 50.0, math.nan, math.inf
    return [value * (8 if number >= 120 else 1) for number, value in enumerate(values)]


def plainly(values: list[float]) -> list[bool]:
    """The rule in double precision."""
    taken, mean, count = [], 0.0, 0
    for value in values:
        limit = FACTOR * mean if count >= LEAST else math.inf
        taken.append(math.isfinite(value) and value <= limit)
        if math.isfinite(value):
            count = min(REMEMBERED, count + 1)
            mean += (min(value, limit) - mean) / count
    return taken


def judged(guard: SpikeGuard, values: list[float]) -> list[bool]:
    return [bool(guard.judge(torch.tensor(value))) for value in values]


def test_spikes_are_judged_as_plain_arithmetic_judges_them() -> None:
    expected = plainly(norms())
    assert judged(SpikeGuard(TrainConfig(spike_factor=FACTOR)), norms()) == expected
    left_out = [number for number, taken in enumerate(expected) if not taken]
    assert {60, 61, 90, 120} <= set(left_out)
    assert 3 not in left_out
    assert all(expected[160:]), "a level that has changed for good is taken in time"
    only_finite = [math.isfinite(value) for value in norms()]
    assert judged(SpikeGuard(TrainConfig()), norms()) == only_finite


@pytest.mark.parametrize("cut", [10, 61, 125])
def test_the_average_comes_back_bit_for_bit(cut: int) -> None:
    whole, first = (SpikeGuard(TrainConfig(spike_factor=FACTOR)) for _ in range(2))
    judged(first, norms()[:cut])
    state = TrainState()
    first.save(state)
    second = SpikeGuard(TrainConfig(spike_factor=FACTOR))
    second.load(TrainState(**TrainState(**state.as_dict()).as_dict()))
    assert judged(second, norms()[cut:]) == judged(whole, norms())[cut:]
    assert torch.equal(second.mean, whole.mean)


class Poison:
    """Batches whose gradients are too large, or are not numbers; and which batch every step took."""

    def __init__(self, patch: pytest.MonkeyPatch, bad: Callable[[int], bool], *, times: float = math.nan) -> None:
        self.batches: list[int] = []
        self.seen: dict[int, list[int]] = {}
        forward_backward, reduce_and_clip = FsdpEngine.forward_backward, FsdpEngine.reduce_and_clip

        def recording(engine: FsdpEngine, micro: Micro, *, scale: float, last: bool) -> LossTerms:
            self.batches.append(int(micro.batch.index_B[0]) // ROWS)
            self.seen[self.batches[-1]] = micro.corruption.x_t_BL.flatten().tolist()
            return forward_backward(engine, micro, scale=scale, last=last)

        def poisoned(engine: FsdpEngine, max_norm: float) -> Tensor:
            if bad(self.batches[-1]):
                for parameter in engine.parameters.values():
                    assert parameter.grad is not None
                    parameter.grad *= times
            return reduce_and_clip(engine, max_norm)

        patch.setattr(FsdpEngine, "forward_backward", recording)
        patch.setattr(FsdpEngine, "reduce_and_clip", poisoned)


def copy_checkpoint(source: Path, target: Path, step: int) -> None:
    name = f"{CHECKPOINTS}/step-{step:08d}"
    shutil.copytree(source / name, target / name)


def test_a_skipped_spike_is_skipped_again_after_a_resume(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {25, 29}.__contains__, times=30.0)
    settings = ("train.steps=32", f"train.spike_factor={FACTOR}", "validation.every=0", "log.every=2")
    assert train(make_config(tmp_path / "whole", *settings)) is Ending.FINISHED
    expected = trace(tmp_path / "whole")
    counts = {step: line["train.skipped"] for step, line in expected.items() if step >= 24}
    assert counts == {24: 0, 26: 1, 28: 1, 30: 2, 32: 2}
    for step in (24, 28):
        copy_checkpoint(tmp_path / "whole", tmp_path / f"from-{step}", step)
        train(make_config(tmp_path / f"from-{step}", *settings))
        assert trace(tmp_path / f"from-{step}") == {n: line for n, line in expected.items() if n > step}


def test_a_rollback_goes_on_after_the_data_of_the_spike(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        undisturbed = Poison(patch, lambda batch: False)
        train(make_config(tmp_path / "undisturbed", "train.steps=18"))
    poison = Poison(monkeypatch, {9, 13}.__contains__)
    settings = ("train.steps=14", "train.on_spike=rollback", "data.num_workers=1")
    config = make_config(tmp_path / "run", *settings)
    assert train(config) is Ending.FINISHED
    # step 10 takes batch 9: back to step 8 and on with batch 10; step 12 takes batch 13: back to step 8 once more
    assert poison.batches == [*range(10), *range(10, 14), *range(14, 20)]
    assert {n: poison.seen[n] for n in range(18)} == undisturbed.seen
    rollbacks = [r for r in read_metrics(config.path / "metrics.jsonl") if r.get("event") == "rollback"]
    told = [(r["spike"], r["step"], r["passed_over"]) for r in rollbacks]
    assert told == [(10, 8, [8, 10]), (12, 8, [8, 14])]
    lines = trace(config.path)
    assert sorted(lines) == list(range(1, 15))
    assert all(line["train.lr"] == learning_rate(n - 1, config.optim, 14) for n, line in lines.items())
    state = load_for_evaluation(config.path).state
    assert (state.step, state.rollbacks, state.skipped, state.passed_over) == (14, 2, 0, [(8, 14)])
    for step in (8, 12):
        copy_checkpoint(config.path, tmp_path / f"from-{step}", step)
        train(make_config(tmp_path / f"from-{step}", *settings))
        assert trace(tmp_path / f"from-{step}") == {n: line for n, line in lines.items() if n > step}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_every_engine_goes_back_in_the_middle_of_a_run(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, engine: str
) -> None:
    """A step in which the guard sees a spike is undone to where FSDP undoes it."""
    judge = SpikeGuard.judge
    for name in ("fsdp", engine):
        calls = iter(range(1, 1000))

        def spike_at_the_tenth(guard: SpikeGuard, norm: Tensor, calls: Iterator[int] = calls) -> Tensor:
            return judge(guard, norm) * (next(calls) != 10)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpikeGuard, "judge", spike_at_the_tenth)
            train(make_config(tmp_path / name, "train.on_spike=rollback", f"engine={name}"))
    ours, theirs = trace(tmp_path / engine), trace(tmp_path / "fsdp")
    assert load_for_evaluation(tmp_path / engine).state.passed_over == [(8, 10)]
    assert ours.keys() == theirs.keys()
    for step, line in theirs.items():
        assert ours[step]["train.loss"] == pytest.approx(line["train.loss"], rel=1e-4)
        assert ours[step]["train.grad_norm"] == pytest.approx(line["train.grad_norm"], rel=1e-3)


def test_a_run_that_was_stopped_in_between_rolls_back_as_far(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the stop in step 9 takes the place of none: it is not what step 10 goes back to."""
    poison = Poison(monkeypatch, {9}.__contains__)
    settings = ("train.on_spike=rollback", "validation.every=0", "checkpoint.keep=1")
    train(make_config(tmp_path / "whole", *settings))
    config = make_config(tmp_path / "stopped", *settings)
    update_ema = FsdpEngine.update_ema

    def stopped_in_step_9(engine: FsdpEngine, decay: float, *, take: Tensor) -> None:
        if poison.batches[-1] == 8:
            signal.raise_signal(signal.SIGUSR1)
        update_ema(engine, decay, take=take)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpEngine, "update_ema", stopped_in_step_9)
        assert train(config) is Ending.SAVED
    assert (config.path / CHECKPOINTS / "step-00000009").exists()
    assert train(config) is Ending.FINISHED
    assert trace(config.path) == trace(tmp_path / "whole")
    assert [path.name for path in (config.path / CHECKPOINTS).iterdir()] == ["step-00000012"]


def test_without_a_checkpoint_a_spike_is_skipped(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, {2}.__contains__)
    config = make_config(tmp_path / "run", "train.on_spike=rollback", "train.steps=6")
    assert train(config) is Ending.FINISHED
    assert poison.batches == list(range(6))
    assert load_for_evaluation(config.path).state.skipped == 1


@pytest.mark.parametrize("stopped_in", [1, 3])
def test_where_a_rollback_goes_does_not_depend_on_earlier_stops(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stopped_in: int
) -> None:
    """A checkpoint that a stop left before the first one of the schedule is none to go back to."""
    Poison(monkeypatch, {3}.__contains__)
    config = make_config(tmp_path / "run", "train.on_spike=rollback", "train.steps=6")
    step = FsdpEngine.step

    def with_signal(engine: FsdpEngine, **arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        step(engine, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FsdpEngine, "step", with_signal)
        for _ in range(stopped_in):
            assert train(config) is Ending.SAVED
    assert train(config) is Ending.FINISHED
    state = load_for_evaluation(config.path).state
    assert (state.skipped, state.rollbacks, state.passed_over) == (1, 0, [])


def test_rollbacks_that_do_not_help_end_the_run(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, lambda batch: batch >= 5)
    config = make_config(tmp_path / "run", "train.on_spike=rollback")
    assert train(config) is Ending.SPIKED
    assert poison.batches == list(range(6 + MAX_ROLLBACKS))
    assert "rollbacks to step 4" in read_metrics(config.path / "metrics.jsonl")[-1]["reason"]


def test_a_spike_may_end_the_run_and_saves_nothing(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Poison(monkeypatch, {7}.__contains__)  # of step 8, after which a checkpoint is due
    config = make_config(tmp_path / "run", "train.on_spike=stop")
    assert train(config) is Ending.SPIKED
    assert [path.name for path in (config.path / CHECKPOINTS).iterdir()] == ["step-00000004"]
    assert "stopped at step 8 of 12 (a spike in the gradient of step 8, norm nan)" in capsys.readouterr().out
