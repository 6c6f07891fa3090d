"""Saves beside the training: what is written, when the loop waits, what it hears, and ephemeral ones in between."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import Batch
from model.config import ModelConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.noise import NoiseKey
from pretrain import trainer
from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.load import CHECKPOINTS, newest_good, read_state, resume
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.save import checkpoint_name, save_checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.parallel.mesh import single_process
from pretrain.state import TrainState
from pretrain.train import train

MODEL = ModelConfig(backbone=TransformerConfig(dim=16, num_layers=1, num_heads=2), vocab_size=33, mask_id=32)
MakeConfig = Callable[..., RunConfig]


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine() -> FsdpEngine:
    return FsdpEngine(MODEL, OptimConfig(), TrainConfig(ema_decay=0.9), ParallelConfig(), single_process(), seed=0)


def train_step(engine: FsdpEngine, step: int) -> None:
    tokens_BL = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        positions_BL=torch.arange(8).expand_as(tokens_BL),
        index_B=torch.arange(4),
    )
    corruption = corrupt(batch, NoiseKey(0, step, batch.index_B), MODEL)
    engine.forward_backward(Micro(batch, corruption, StepSchedule()), scale=1 / corruption.divisor, last=True)
    engine.reduce_and_clip(1.0)
    engine.step(lr=1e-2, take=torch.ones(()))
    engine.update_ema(0.9, take=torch.ones(()))


def copied(engine: FsdpEngine) -> dict[str, torch.Tensor]:
    return {f"{g}.{n}": t.clone() for g, named in engine.state_dict().items() for n, t in named.items()}


def make_saver(
    folder: Path,
    engine: FsdpEngine,
    *,
    heard: list[tuple[str, int]] | None = None,
    save_tokenizer: Callable[[Path], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> Saver:
    def on_sealed(path: Path, state: TrainState) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert (path / "manifest.json").exists()
        if heard is not None:
            heard.append((path.name, state.step))

    config = CheckpointConfig(**settings)
    return Saver(folder, config, MODEL, engine.mesh, save_tokenizer=save_tokenizer, on_sealed=on_sealed, clock=clock)


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No save writes anything before the event is set."""
    released, start = threading.Event(), save_module._start

    def when_released(partial: Path) -> None:
        assert released.wait(60)
        start(partial)

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "_start", when_released)
        try:
            yield released
        finally:
            released.set()


def test_what_is_written_is_the_step_of_the_save_though_training_goes_on(
    tmp_path: Path, engine: FsdpEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, because the second save uses the memory of the first; against files that were written at once."""
    state, number = TrainState(identity={"seed": 3}), 0
    with make_saver(tmp_path / "beside", engine) as saver:
        for _ in range(2):
            train_step(engine, number)
            state.step, state.tokens = number + 1, 100 * (number + 1)
            expected = copied(engine)
            at_once = save_checkpoint(
                tmp_path / "at_once", engine.state_dict(), state, MODEL, engine.mesh.world, save_tokenizer=None, keep=9
            )
            with held_back(monkeypatch) as released:
                saver.save(engine.state_dict(), state)
                for _ in range(3):
                    number += 1
                    train_step(engine, number)
                state.step, state.tokens, state.identity["seed"] = number + 1, -1, 4
                assert all(not torch.equal(t, expected[name]) for name, t in copied(engine).items())
                assert not list((tmp_path / "beside").glob(at_once.name + "*"))
                released.set()
                saver.finish()
            beside = tmp_path / "beside" / at_once.name
            for name in ("tensors/__0_0.distcp", "state.json", "model.json"):
                assert (beside / name).read_bytes() == (at_once / name).read_bytes(), name
            resume(beside, engine, MODEL, read_state(beside).identity)
            found = copied(engine)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            state.identity["seed"] = 3


def test_the_next_save_waits_for_the_one_in_flight(
    tmp_path: Path, engine: FsdpEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int]] = []
    with make_saver(tmp_path, engine, heard=heard, keep=9) as saver:
        with held_back(monkeypatch) as released:
            saver.save(engine.state_dict(), TrainState(step=1))
            saver.poll()
            assert heard == []
            threading.Timer(0.2, released.set).start()
            saver.save(engine.state_dict(), TrainState(step=2))
        assert heard == [(checkpoint_name(1), 1)]
        saver.finish()
    assert heard == [(checkpoint_name(1), 1), (checkpoint_name(2), 2)]
    assert newest_good(tmp_path) == tmp_path / checkpoint_name(2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_finished_save_is_heard_of_by_asking(tmp_path: Path, engine: FsdpEngine, asynchronous: bool) -> None:
    heard: list[tuple[str, int]] = []
    with make_saver(tmp_path, engine, heard=heard, asynchronous=asynchronous) as saver:
        saver.save(engine.state_dict(), TrainState(step=1))
        assert saver.flight is not None
        saver.flight.outcome.exception()
        saver.poll()
        assert heard == [(checkpoint_name(1), 1)]
        saver.poll()
        saver.finish()
    assert len(heard) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ask", [Saver.poll, Saver.wait, Saver.finish])
def test_what_goes_wrong_in_a_save_is_raised_in_the_loop(
    tmp_path: Path, engine: FsdpEngine, asynchronous: bool, ask: Callable[[Saver], None]
) -> None:
    def melt(folder: Path) -> None:
        raise RuntimeError("the tokenizer has melted")

    with make_saver(tmp_path, engine, save_tokenizer=melt, asynchronous=asynchronous) as saver:
        saver.save(engine.state_dict(), TrainState(step=1))
        assert saver.flight is not None
        saver.flight.outcome.exception()
        with pytest.raises(RuntimeError, match="the tokenizer has melted"):
            ask(saver)
    assert newest_good(tmp_path) is None


def test_a_failing_run_lets_its_save_end(tmp_path: Path, engine: FsdpEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(saver: Saver) -> None:
        with saver:
            saver.save(engine.state_dict(), TrainState(step=1))
            threading.Timer(0.2, released.set).start()
            raise ZeroDivisionError

    with held_back(monkeypatch) as released:
        saver = make_saver(tmp_path, engine)
        with pytest.raises(ZeroDivisionError):
            fail(saver)
    assert newest_good(tmp_path) == tmp_path / checkpoint_name(1)


def test_ephemeral_ones_come_by_the_clock_and_never_behind_another_save(
    tmp_path: Path, engine: FsdpEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with make_saver(tmp_path, engine, clock=clock, ephemeral_minutes=2) as saver:
        clock.now = 119
        assert not saver.ephemeral_due()
        clock.now = 120
        assert saver.ephemeral_due()
        with held_back(monkeypatch) as released:
            saver.save(engine.state_dict(), TrainState(step=1), "ephemeral")
            clock.now = 300
            assert not saver.ephemeral_due()
            released.set()
            saver.wait()
        assert saver.ephemeral_due()
        saver.save(engine.state_dict(), TrainState(step=2))
        saver.wait()
        clock.now = 419
        assert not saver.ephemeral_due()
        saver.save(engine.state_dict(), TrainState(step=3), "ephemeral")
        saver.finish()
    kinds = {path.name: read_manifest(path).kind for path in tmp_path.iterdir()}
    assert kinds == {checkpoint_name(2): "permanent", checkpoint_name(3): "ephemeral"}
    with make_saver(tmp_path, engine, clock=clock) as saver:
        clock.now = 1e9
        assert not saver.ephemeral_due()


def test_a_run_saves_ephemeral_ones_between_its_permanent_ones(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute a step: after every third step since the last save, where a line is logged."""
    clock, step = Clock(), FsdpEngine.step

    def timed(engine: FsdpEngine, **arguments: Any) -> None:
        clock.now += 30
        step(engine, **arguments)

    monkeypatch.setattr(FsdpEngine, "step", timed)
    monkeypatch.setattr(trainer, "Saver", partial(Saver, clock=clock))
    settings = ["checkpoint.every=8", "checkpoint.ephemeral_minutes=1.5", "checkpoint.asynchronous=false"]
    for log_every, expected in ((1, [3, 6, 8, 11, 12]), (4, [4, 8, 12])):
        clock.now = 0.0
        config = make_config(tmp_path / f"run{log_every}", *settings, f"log.every={log_every}")
        train(config)
        lines = read_metrics(config.path / "metrics.jsonl")
        assert [line["step"] for line in lines if line.get("event") == "checkpoint"] == expected
        left = sorted(path.name for path in (config.path / CHECKPOINTS).iterdir())
        assert left == [checkpoint_name(8), checkpoint_name(12)]


def test_a_run_goes_on_from_an_ephemeral_one(
    tmp_path: Path, make_config: MakeConfig, trace: Callable[[Path], dict[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config(tmp_path / "whole")
    train(whole)
    killed = make_config(tmp_path / "killed", "checkpoint.every=0", "checkpoint.ephemeral_minutes=1e-9")

    def killed_after(engine: FsdpEngine, **arguments: Any) -> None:
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        step(engine, **arguments)

    steps: list[int] = []
    step = FsdpEngine.step
    with monkeypatch.context() as patch:
        patch.setattr(FsdpEngine, "step", killed_after)
        with pytest.raises(KeyboardInterrupt):
            train(killed)
    (left,) = (killed.path / CHECKPOINTS).iterdir()
    assert read_manifest(left).kind == "ephemeral"
    train(killed)
    assert trace(killed.path) == trace(whole.path)
