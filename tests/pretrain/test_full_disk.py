"""A full disk under the whole run folder costs records and saves, never the run; records follow when there is room."""

import errno
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pretrain.checkpoint.load import load_for_evaluation
from pretrain.config import RunConfig
from pretrain.endings import Ending
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks import json_lines
from pretrain.hooks.base import Hook, StepRecord, tell
from pretrain.hooks.json_lines import JsonLines
from pretrain.hooks.metrics import read_metrics
from pretrain.hooks.spans import read_spans
from pretrain.hooks.tensorboard import TensorBoardFiles
from pretrain.settings import load_config
from pretrain.state import TrainState
from pretrain.train import train

MakeConfig = Callable[..., RunConfig]
SmallDisk = Callable[[Path, str], AbstractContextManager[None]]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
PAGE = 4096


def fill(place: Path, room: int = 0) -> Path:
    """Leaves so many bytes free, in whole pages."""
    ballast = place / "ballast"
    ballast.write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - room))
    return ballast


def fill_once_saved(run: Path) -> None:
    """With the first checkpoint on it."""
    while not (run / "checkpoints" / "step-00000004").exists():
        time.sleep(0.01)
    fill(run)


def whole_lines(path: Path) -> list[Any]:
    """Every line, none of them broken."""
    text = path.read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("room", [0, PAGE])
def test_lines_wait_for_a_full_disk_and_follow_whole(
    tmp_path: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    """With a page free the system takes the first part of a line, which must not stay."""
    place = tmp_path / "disk"
    wide = "x" * (PAGE + 3500)
    with small_disk(place, "1m"):
        lines = JsonLines(place / "lines.jsonl")
        lines.append({"n": 0, "wide": wide})
        ballast = fill(place, room)
        for n in (1, 2):
            lines.append({"n": n, "wide": wide})
            assert [line["n"] for line in whole_lines(lines.path)] == [0]
        ballast.unlink()
        lines.append({"n": 3, "wide": wide})
        assert [(line["n"], line["wide"] == wide) for line in whole_lines(lines.path)] == [(n, True) for n in range(4)]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"penumbra: {lines.path} can not be written ([Errno 28] No space left on device")
    assert second == f"penumbra: {lines.path} can be written again, 2 lines came late"


def test_so_many_lines_wait_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MOST_WAITING", 3)
    (tmp_path / "folder").write_text("in the way")
    lines = JsonLines(tmp_path / "folder" / "lines.jsonl")
    for n in range(5):
        lines.append({"n": n})
    (tmp_path / "folder").unlink()
    lines.append({"n": 5})
    assert [line["n"] for line in whole_lines(lines.path)] == [3, 4, 5]


def test_a_line_follows_half_of_another(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 0}\n{"n": ')
    JsonLines(path).append({"n": 2})
    assert path.read_text() == '{"n": 0}\n{"n": \n{"n": 2}\n'


def at_calls(method: str, events: dict[int, Callable[[], object]]) -> pytest.MonkeyPatch:
    """From now on something happens before given calls, counted from 1, of a method of the engine."""
    original, calls = getattr(FsdpEngine, method), iter(range(1, 1000))

    def eventful(*arguments: Any, **named: Any) -> Any:
        events.get(next(calls), lambda: None)()
        return original(*arguments, **named)

    patch = pytest.MonkeyPatch()
    patch.setattr(FsdpEngine, method, eventful)
    return patch


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_outlives_a_disk_that_is_full_for_a_while(
    tmp_path: Path,
    make_config: MakeConfig,
    trace: Callable[[Path], Any],
    small_disk: SmallDisk,
    capsys: pytest.CaptureFixture[str],
    asynchronous: str,
) -> None:
    """From the sixth step to the thirtieth: records wait, the saves meanwhile are lost, that of step 4 stays."""
    whole = make_config(tmp_path / "whole", "train.steps=34")
    train(whole)
    config = make_config(tmp_path / "run", "train.steps=34", f"checkpoint.asynchronous={asynchronous}")
    ballast = config.path / "ballast"
    seen: list[int] = []

    def look_and_free() -> None:
        seen.append(load_for_evaluation(config.path).state.step)
        seen.append(max(line["step"] for line in whole_lines(config.path / "metrics.jsonl")))
        ballast.unlink()

    with small_disk(config.path, "4m"):
        patch = at_calls("forward_backward", {6: lambda: fill_once_saved(config.path), 30: look_and_free})
        try:
            assert train(config) is Ending.FINISHED
        finally:
            patch.undo()
        saved, logged = seen
        assert saved == 4
        assert logged < 29
        assert trace(config.path) == trace(whole.path)
        whole_lines(config.path / "metrics.jsonl")
        assert [line["step"] for line in read_spans(config.path / "spans")[0]] == [*range(1, 35), 34]
        kept = [
            line["step"] for line in read_metrics(config.path / "metrics.jsonl") if line.get("event") == "checkpoint"
        ]
        assert kept == [4, 32, 34]
    said = capsys.readouterr().err
    assert "the checkpoint of step 8 can not be written" in said
    assert "metrics.jsonl can be written again" in said


def test_settings_are_written_as_soon_as_there_is_room(
    tmp_path: Path, make_config: MakeConfig, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run")
    with small_disk(config.path, "4m"):
        ballast = fill(config.path)
        patch = at_calls("forward_backward", {2: ballast.unlink})
        try:
            assert train(config) is Ending.FINISHED
        finally:
            patch.undo()
        assert load_config(config.path / "config.yaml") == config
        assert whole_lines(config.path / "metrics.jsonl")[0]["event"] == "start"
    assert "penumbra: ConfigFile could not write ([Errno 28] No space left on device" in capsys.readouterr().err


class Scribe(Hook):
    """Fails in the steps that it is given."""

    def __init__(self, error: Exception, steps: set[int]) -> None:
        self.error, self.steps, self.heard = error, steps, list[int]()

    def on_step_end(self, step: int) -> None:
        if step in self.steps:
            raise self.error
        self.heard.append(step)


def test_a_hook_that_the_disk_refuses_loses_its_record_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    hooks = [Scribe(FULL, {2, 3}), Scribe(FULL, set())]
    for step in range(1, 5):
        tell(hooks, lambda hook, step=step: hook.on_step_end(step))  # type: ignore[misc]
    assert [hook.heard for hook in hooks] == [[1, 4], [1, 2, 3, 4]]
    assert capsys.readouterr().err == (
        "penumbra: Scribe could not write ([Errno 28] No space left on device): training goes on without it\n"
    )


def test_a_mistake_in_a_hook_still_ends_the_run() -> None:
    with pytest.raises(KeyError):
        tell([Scribe(KeyError("a mistake"), {1})], lambda hook: hook.on_step_end(1))


class Writer:
    """A SummaryWriter whose first file takes nothing more after step 1."""

    opened: list["Writer"]

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.purge_step, self.told, self.closed = purge_step, list[int](), False
        self.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if len(self.opened) == 1 and step > 1:
            raise FULL
        self.told.append(step)

    def close(self) -> None:
        self.closed = True
        if len(self.opened) == 1:
            raise FULL


def test_tensorboard_goes_on_in_a_new_file_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    Writer.opened = []
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    hook = TensorBoardFiles(tmp_path)
    hook.on_start(TrainState(), resumed=False)
    for step in (1, 2, 3, 4):
        record = StepRecord(step, 1.0, 1.0, 1.0, 1e-3, 0, 0, 1.0, None)
        tell([hook], lambda hook, record=record: hook.on_log(record))  # type: ignore[misc]
        if step == 3:
            tell([hook], lambda hook: hook.on_checkpoint(tmp_path, TrainState(step=3)))
    tell([hook], lambda hook: hook.on_finish(TrainState(step=4)))
    first, second = Writer.opened
    assert (set(first.told), set(second.told)) == ({1}, {4})
    assert (first.purge_step, second.purge_step) == (1, None)
    assert first.closed
    assert second.closed


def test_a_lost_save_leaves_no_worker_behind(tmp_path: Path, make_config: MakeConfig, small_disk: SmallDisk) -> None:
    """The error of the save holds on to the loop's frames, and with them to the loader, for whose workers a process
    would wait for ever when it ends."""
    config = make_config(tmp_path / "run", "data.num_workers=1", "train.steps=20")
    with small_disk(config.path, "4m"):
        patch = at_calls(
            "forward_backward", {6: lambda: fill_once_saved(config.path), 11: (config.path / "ballast").unlink}
        )
        gc.disable()
        try:
            assert train(config) is Ending.FINISHED
            assert multiprocessing.active_children() == []
        finally:
            gc.enable()
            patch.undo()


def test_an_error_leaves_no_worker_behind(tmp_path: Path, make_config: MakeConfig) -> None:
    def fail() -> None:
        raise KeyError("a mistake")

    patch = at_calls("forward_backward", {3: fail})
    try:
        with pytest.raises(KeyError) as error:
            train(make_config(tmp_path / "run", "data.num_workers=1"))
        assert multiprocessing.active_children() == []
        assert error.traceback
    finally:
        patch.undo()
