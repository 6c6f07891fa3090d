"""A run that is asked to stop saves where it stands, says so by its exit code, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.load import load_for_evaluation
from pretrain.config import RunConfig
from pretrain.data import open_data
from pretrain.endings import Ending
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.hooks.signals import REASONS, SIGNALS, Stopped, StopRequest, stop_signals
from pretrain.parallel.mesh import Axis, single_process
from pretrain.train import train
from pretrain.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., RunConfig]
Trace = dict[int, dict[str, Any]]
SETTINGS = ("train.micro_batch_tokens=256",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    """A run that nobody stops."""
    config = make_config(tmp_path_factory.mktemp("runs") / "whole", *SETTINGS)
    assert train(config) is Ending.FINISHED
    return config.path


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def signalled(method: str, call: int, number: signal.Signals = signal.SIGTERM) -> pytest.MonkeyPatch:
    """From now on the process gets a signal within the given call, counted from 1, of a method of the engine."""
    original, calls = getattr(FsdpEngine, method), iter(range(1, 1000))

    def method_with_signal(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    patch = pytest.MonkeyPatch()
    patch.setattr(FsdpEngine, method, method_with_signal)
    return patch


def stopped(config: RunConfig, method: str, call: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Runs until it has been stopped there."""
    patch = signalled(method, call, number)
    try:
        assert train(config) is Ending.SAVED
    finally:
        patch.undo()


def events(folder: Path) -> list[tuple[str, int]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [(line["event"], line["step"]) for line in lines if line["kind"] == "event"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_a_step_saves_after_it(
    tmp_path: Path, make_config: MakeConfig, whole: Path, trace: Callable[[Path], Trace], number: signal.Signals
) -> None:
    config = make_config(tmp_path / "run", *SETTINGS)
    stopped(config, "forward_backward", 2 * 5 + 1, number)  # two micro-batches a step: the sixth step
    assert events(config.path) == [("start", 0), ("checkpoint", 4), ("checkpoint", 6), ("stop", 6)]
    assert read_metrics(config.path / "metrics.jsonl")[-1]["reason"] == number.name
    assert load_for_evaluation(config.path).state.step == 6
    assert train(config) is Ending.FINISHED
    assert trace(config.path) == trace(whole)


@pytest.mark.parametrize("step", [6, 12])
def test_a_signal_in_a_validation_cuts_it_short_and_it_is_made_up_for(
    tmp_path: Path, make_config: MakeConfig, trace: Callable[[Path], Trace], step: int
) -> None:
    small = "train.micro_batch_tokens=64"
    train(make_config(tmp_path / "whole", small))
    config = make_config(tmp_path / "run", small)
    stopped(config, "evaluate", 2 if step == 6 else 6)  # four batches a validation
    assert events(config.path)[-2:] == [("checkpoint", step), ("stop", step)]
    assert load_for_evaluation(config.path).state.owes_validation
    assert "validation.nelbo" not in trace(config.path)[step]
    assert train(config) is Ending.FINISHED
    assert trace(config.path) == trace(tmp_path / "whole")


def test_a_signal_in_a_save_lets_it_end_and_saves_no_more(
    tmp_path: Path, make_config: MakeConfig, whole: Path, trace: Callable[[Path], Trace]
) -> None:
    config = make_config(tmp_path / "run", *SETTINGS)
    stopped(config, "state_dict", 1)
    assert events(config.path) == [("start", 0), ("checkpoint", 4), ("stop", 4)]
    assert train(config) is Ending.FINISHED
    assert trace(config.path) == trace(whole)


def test_a_signal_before_the_first_step_keeps_it_from_starting(
    tmp_path: Path, make_config: MakeConfig, whole: Path, trace: Callable[[Path], Trace]
) -> None:
    """The first forward pass is where a compiled model is compiled."""
    config = make_config(tmp_path / "run", *SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpEngine, "forward_backward", lambda *_, **__: pytest.fail("a step was begun"))
        stopped(config, "__init__", 1)
    assert events(config.path) == [("start", 0), ("checkpoint", 0), ("stop", 0)]
    assert train(config) is Ending.FINISHED
    assert trace(config.path) == trace(whole)


@pytest.mark.slow
def test_a_signal_while_the_model_is_compiled_ends_after_the_first_step(
    tmp_path: Path,
    make_config: MakeConfig,
    write_config: Callable[[RunConfig, Path], Path],
    trace: Callable[[Path], Trace],
) -> None:
    small = "model.backbone.num_layers=1"
    config = make_config(tmp_path / "run", small, "train.compile=true")
    cache = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "pretrain.train", str(write_config(config, tmp_path / "run.yaml"))]
    process = subprocess.Popen(command, env=environment)
    while not list(cache.rglob("*.cpp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == Ending.SAVED
    assert events(config.path) == [("start", 0), ("checkpoint", 1), ("stop", 1)]
    assert load_for_evaluation(config.path).state.step == 1
    assert subprocess.run(command, env=environment).returncode == Ending.FINISHED
    train(make_config(tmp_path / "plain", small))
    compiled, plain = trace(config.path), trace(tmp_path / "plain")
    assert compiled.keys() == plain.keys()
    for step, line in plain.items():
        assert compiled[step]["train.loss"] == pytest.approx(line["train.loss"], rel=1e-4), step


def test_a_run_stops_when_its_time_is_up(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(tmp_path / "run", "train.time_limit_minutes=1e-9")
    assert train(config) is Ending.SAVED
    assert read_metrics(config.path / "metrics.jsonl")[-1]["reason"] == "time limit"


def test_the_time_limit_counts_from_the_beginning() -> None:
    clock = iter([100.0, 159.9, 160.0])
    request = StopRequest(60.0, clock=lambda: next(clock))
    assert sum(request.votes()) == 0
    assert dict(zip(REASONS, request.votes()))["time limit"] == 1
    assert sum(StopRequest(0.0, clock=lambda: 1e9).votes()) == 0


def test_one_rank_stops_all() -> None:
    deaf, asked = StopRequest(), StopRequest()
    deaf.decide(deaf.votes())
    asked.ask("SIGUSR2")
    with pytest.raises(Stopped, match="SIGUSR2"):
        deaf.decide([a + b for a, b in zip(deaf.votes(), asked.votes())])


class Alike(Axis):
    """Ranks that all say the same."""

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        return [self.size * value for value in values]


def test_ranks_that_share_rows_count_them_once(tmp_path: Path, make_config: MakeConfig) -> None:
    """Four ranks, two of which have rows of their own: 3 and 5 on each of those."""
    config = make_config(tmp_path / "run")
    data = open_data(config.data, Axis())
    model = config.model.with_vocabulary(data.tokenizer.vocab_size, data.tokenizer.mask_id)
    engine = FsdpEngine(model, config.optim, config.train, config.parallel, single_process(), seed=0)
    engine.mesh = replace(single_process(), world=Alike(0, 4), data=Axis(0, 2))
    trainer = Trainer(config, model, engine, data, hooks=[])
    assert trainer._agree([3.0, 5.0]) == [6.0, 10.0]
    trainer.stop.ask("SIGINT")
    with pytest.raises(Stopped, match="SIGINT"):
        trainer._agree()


def test_the_second_interrupt_ends_it_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    request = StopRequest()
    with stop_signals(request):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert request.asked == {"SIGTERM", "SIGINT"}
        assert "SIGINT: saving after this step; once more ends it at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
