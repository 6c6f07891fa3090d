"""Disks that are full, read-only or broken: the last good checkpoint stays, nothing piles up, training goes on."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystem

from data_pipeline.tokenizers import Tokenizer, make_tokenizer
from model.config import ModelConfig, TransformerConfig
from pretrain.checkpoint import save as save_module
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation, newest_good, resume
from pretrain.checkpoint.save import NotSaved, checkpoint_name, save_checkpoint
from pretrain.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from pretrain.state import TrainState
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(backbone=TransformerConfig(dim=32, num_layers=1, num_heads=2), vocab_size=259, mask_id=256)
MakeConfig = Callable[..., RunConfig]
SmallDisk = Callable[[Path, str], AbstractContextManager[None]]
FULL, READ_ONLY, DENIED = (OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.EROFS, errno.EACCES))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer("bytes", lambda: iter(()))


@pytest.fixture(scope="module")
def engine() -> FsdpEngine:
    return FsdpEngine(MODEL, OptimConfig(), TrainConfig(), ParallelConfig(), single_process(), seed=0)


def remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", place], check=True)


class Refusals:
    """Makes the n-th request of several kinds fail, and counts the requests."""

    def __init__(self, patch: pytest.MonkeyPatch, error: OSError, nth: int) -> None:
        self.count, self.nth, self.error = 0, nth, error
        for name in ("fsync", "mkdir", "rename"):
            patch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, request: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == self.nth:
                raise self.error
            return request(*arguments, **keywords)

        return asked


class FullFile(io.FileIO):
    """Takes what fits, and no more."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 4096:
            raise FULL
        return super().write(data)


@contextmanager
def full_stream(files: FileSystem, path: Path, mode: str) -> Iterator[io.IOBase]:
    with FullFile(path, mode) as stream:
        yield stream


def save(folder: Path, step: int, engine: FsdpEngine, tokenizer: Tokenizer, *, keep: int = 1) -> Path:
    return save_checkpoint(
        folder,
        engine.state_dict(),
        TrainState(step=step),
        MODEL,
        engine.mesh.world,
        save_tokenizer=tokenizer.save,
        keep=keep,
    )


def good_step(folder: Path, engine: FsdpEngine) -> int:
    checkpoint = newest_good(folder)
    assert checkpoint is not None
    return resume(checkpoint, engine, MODEL, {}).step


@pytest.mark.parametrize("error", [FULL, READ_ONLY, DENIED], ids=lambda error: errno.errorcode[error.errno])
def test_whatever_the_system_refuses_the_previous_checkpoint_stays(
    tmp_path: Path, engine: FsdpEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    save(tmp_path, 1, engine, tokenizer)
    seen = []
    for nth in range(1, 100):
        with monkeypatch.context() as patch:
            refusals = Refusals(patch, error, nth)
            with suppress(NotSaved):
                save(tmp_path, 2, engine, tokenizer)
            if refusals.count < nth:
                break
        seen.append(good_step(tmp_path, engine))
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
        if seen[-1] == 1:
            assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(1)]
    assert len(seen) > 8
    assert seen == sorted(seen)
    assert seen[0] == 1
    save(tmp_path, 3, engine, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(3)]


def test_a_file_that_does_not_fit_is_a_full_disk_and_no_riddle(
    tmp_path: Path, engine: FsdpEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, engine, tokenizer)
    monkeypatch.setattr(FileSystem, "create_stream", full_stream)
    sentence = rf"the checkpoint of step 2 can not be written to {tmp_path} \(\[Errno 28\] No space left on device\)"
    with pytest.raises(NotSaved, match=sentence):
        save(tmp_path, 2, engine, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(1)]


def test_what_a_killed_save_left_makes_room_for_the_next(
    tmp_path: Path, engine: FsdpEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it writes, not after: the disk may be full of it."""
    leftover = tmp_path / f"{checkpoint_name(7)}.tmp"
    leftover.mkdir()
    write_tensors = save_module._write_tensors

    def looking(*arguments: Any) -> Any:
        assert not leftover.exists()
        return write_tensors(*arguments)

    monkeypatch.setattr(save_module, "_write_tensors", looking)
    save(tmp_path, 8, engine, tokenizer)


def test_a_mistake_is_not_taken_for_a_full_disk(
    tmp_path: Path, engine: FsdpEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*arguments: Any) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(save_module, "_write_small_files", mistaken)
    with pytest.raises(KeyError, match="a mistake"):
        save(tmp_path, 1, engine, tokenizer)


def test_a_real_disk_that_is_full_or_read_only(
    tmp_path: Path, engine: FsdpEngine, tokenizer: Tokenizer, small_disk: SmallDisk
) -> None:
    place = tmp_path / "disk"
    with small_disk(place, "1m"):
        save(place, 1, engine, tokenizer)
        ballast = place / "ballast"
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        for room in (0, 4096, 20_000, 100_000):
            ballast.write_bytes(bytes(free - room))
            with pytest.raises(NotSaved, match=r"\[Errno 28\] No space left on device"):
                save(place, 2, engine, tokenizer)
            assert sorted(path.name for path in place.iterdir()) == ["ballast", checkpoint_name(1)]
            assert good_step(place, engine) == 1
        ballast.unlink()
        remount(place, "ro")
        with pytest.raises(NotSaved, match=r"\[Errno 30\] Read-only file system"):
            save(place, 2, engine, tokenizer)
        assert good_step(place, engine) == 1
        remount(place, "rw")
        save(place, 2, engine, tokenizer)
        assert good_step(place, engine) == 2


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_training_goes_on_and_saves_again_where_there_is_room(
    tmp_path: Path,
    make_config: MakeConfig,
    trace: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asynchronous: str,
) -> None:
    whole = make_config(tmp_path / "whole")
    train(whole)
    start = save_module._start

    def full_at_step_8(partial: Path) -> None:
        start(partial)
        if partial.stem == checkpoint_name(8):
            raise FULL

    monkeypatch.setattr(save_module, "_start", full_at_step_8)
    config = make_config(tmp_path / "run", f"checkpoint.asynchronous={asynchronous}")
    capsys.readouterr()
    train(config)
    assert capsys.readouterr().err == (
        f"penumbra: the checkpoint of step 8 can not be written to {config.path / CHECKPOINTS} "
        "([Errno 28] No space left on device): training goes on and the next save tries again\n"
    )
    left = sorted(path.name for path in (config.path / CHECKPOINTS).iterdir())
    assert left == [checkpoint_name(4), checkpoint_name(12)]
    assert trace(config.path) == trace(whole.path)


def test_a_run_whose_last_checkpoint_is_lost_ends_with_a_sentence_and_code_2(
    tmp_path: Path,
    make_config: MakeConfig,
    write_config: Callable[[RunConfig, Path], Path],
    small_disk: SmallDisk,
) -> None:
    """One checkpoint fits on the disk, two do not."""
    config = make_config(tmp_path / "run")
    folder = config.path / CHECKPOINTS
    with small_disk(folder, "1m"):
        command = [sys.executable, "-m", "pretrain.train", str(write_config(config, tmp_path / "run.yaml"))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        why = f"can not be written to {folder} ([Errno 28] No space left on device):"
        assert result.stderr.splitlines() == [
            f"penumbra: the checkpoint of step 8 {why} training goes on and the next save tries again",
            f"penumbra: the checkpoint of step 12 {why} make room there and start the run again, "
            "it goes on from its newest checkpoint",
        ]
        assert [path.name for path in folder.iterdir()] == [checkpoint_name(4)]
        assert load_for_evaluation(config.path).state.step == 4
        remount(folder, "size=9m")
        assert subprocess.run(command, env=environment).returncode == 0
        assert load_for_evaluation(config.path).state.step == 12


def test_a_folder_that_takes_no_checkpoint_is_refused_before_training(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(tmp_path / "run")
    config.path.mkdir()
    (config.path / CHECKPOINTS).write_text("a file")
    with pytest.raises(ValueError, match=r"no checkpoint can be written to .*: choose another folder=\.\.\."):
        train(config)
    assert not (config.path / "metrics.jsonl").exists()
