"""What a run tells about itself: where its time goes, traces of steps, memory, TensorBoard's files."""

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.hooks.profiling import MemorySnapshot
from pretrain.hooks.spans import DEVICE_PHASES, HOST_PHASES, Spans, read_spans
from pretrain.train import train

MakeConfig = Callable[..., RunConfig]


def test_time_goes_to_the_phase_that_takes_it(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase is slowed down by an amount of its own, which its spans then hold at least."""
    evaluate, state_dict, forward, backward = (
        FsdpEngine.evaluate,
        FsdpEngine.state_dict,
        FsdpEngine._forward,
        torch.Tensor.backward,
    )

    def slowly(seconds: float, method: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return method(*arguments, **named)

        return slow

    monkeypatch.setattr(FsdpEngine, "_forward", slowly(0.02, forward))
    monkeypatch.setattr(torch.Tensor, "backward", slowly(0.05, backward))
    monkeypatch.setattr(FsdpEngine, "evaluate", slowly(0.3, evaluate))
    monkeypatch.setattr(FsdpEngine, "state_dict", slowly(0.2, state_dict))
    train(make_config(tmp_path / "run", "train.steps=8", "log.every=2", "validation.every=4"))
    ((rank, lines),) = read_spans(tmp_path / "run" / "spans").items()
    assert rank == 0
    assert [(line["step"], line["steps"]) for line in lines] == [(2, 2), (4, 2), (6, 2), (8, 2), (8, 0)]
    assert all(line["forward"] >= 2 * 0.02 for line in lines[:4])
    assert all(line["backward"] >= 2 * 0.05 for line in lines[:4])
    for name, seconds in (("validation", 0.3), ("save", 0.2)):
        assert [line.get(name, 0) >= seconds for line in lines] == [False, False, True, False, True], name
    for line in lines:
        phases = {key: value for key, value in line.items() if key in DEVICE_PHASES + HOST_PHASES}
        assert sum(phases.values()) <= line["seconds"]
        assert line["peak_memory"] > 50e6
    times = [line["time"] for line in lines]
    assert times == sorted(times)


def test_spans_of_a_resumed_run_follow_on_a_line_of_their_own(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = tmp_path / "run" / "spans"
    folder.mkdir(parents=True)
    (folder / "rank-0.jsonl").write_text('{"step": 2, "half')
    train(make_config(tmp_path / "run", "train.steps=2", "validation.every=0"))
    assert [line["step"] for line in read_spans(folder)[0]] == [1, 2, 2]


def test_an_unknown_phase_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="forwards"), Spans(torch.device("cpu"))("forwards"):
        pass


def test_chosen_steps_are_traced(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_backward, calls = FsdpEngine.forward_backward, iter(range(1, 100))

    def marked(engine: FsdpEngine, micro: Micro, **named: Any) -> Any:
        with torch.profiler.record_function(f"step number {next(calls)}"):
            return forward_backward(engine, micro, **named)

    monkeypatch.setattr(FsdpEngine, "forward_backward", marked)
    train(make_config(tmp_path / "run", "train.steps=4", "log.profile_steps=[1,3]"))
    folder = tmp_path / "run" / "profiles"
    assert sorted(path.name for path in folder.iterdir()) == ["step-1.json.gz", "step-3.json.gz"]
    for step in (1, 3):
        trace = json.loads(gzip.decompress((folder / f"step-{step}.json.gz").read_bytes()))
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert {name for name in names if name.startswith("step number")} == {f"step number {step}"}
        assert "aten::mm" in names


def test_a_memory_snapshot_needs_a_gpu(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"log\.memory_snapshot=3 needs a GPU, .*set it to 0"):
        MemorySnapshot(tmp_path, 0, 3, torch.device("cpu"))


def test_the_log_says_how_much_memory_was_held(tmp_path: Path, make_config: MakeConfig) -> None:
    train(make_config(tmp_path / "run", "train.steps=3"))
    (status,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["peak_memory"] for line in lines] == sorted(line["peak_memory"] for line in lines)
    assert lines[-1]["peak_memory"] == pytest.approx(1024 * int(status.split()[1]), rel=0.05)


class Writer:
    """Stands for torch.utils.tensorboard.SummaryWriter."""

    opened: list["Writer"]

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.log_dir, self.purge_step, self.closed = log_dir, purge_step, False
        self.scalars: dict[tuple[str, int], float] = {}
        self.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        self.scalars[name, step] = value

    def close(self) -> None:
        self.closed = True


def test_tensorboard_hears_what_metrics_hear(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    Writer.opened = []
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    settings = ("log.tensorboard=true", "train.steps=4", "validation.every=4")
    train(make_config(tmp_path / "run", *settings))
    train(make_config(tmp_path / "run", *settings, "train.steps=6", "optim.schedule=constant"))
    first, second = Writer.opened
    assert (first.log_dir, first.purge_step, second.purge_step) == (str(tmp_path / "run" / "tensorboard"), 1, 5)
    assert first.closed
    assert second.closed
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    told = first.scalars | second.scalars
    for line in lines:
        if line["kind"] == "train":
            assert told["train/loss", line["step"]] == line["loss"]
        if line["kind"] == "validation":
            assert told["validation/nelbo", line["step"]] == line["nelbo"]
    assert {name for name, _ in told} >= {"train/grad_norm", "train/lr", "train/tokens_per_second", "train/peak_memory"}


def test_tensorboard_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'penumbra-diffusion\[tensorboard\]'"):
        train(make_config(tmp_path / "run", "log.tensorboard=true"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
