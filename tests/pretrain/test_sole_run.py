"""One run at a time in a folder, whatever becomes of the one before."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain.config import RunConfig
from pretrain.parallel.mesh import single_process
from pretrain.sole_run import LOCK, sole_run
from pretrain.train import train

WORLD = single_process().world
OTHER = """
import os, sys, time
from pathlib import Path
from pretrain.parallel.mesh import single_process
from pretrain.sole_run import sole_run
with sole_run(Path(sys.argv[1]), single_process().world):
    if worker := os.fork():
        print(worker, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.sole_run.PATIENCE", 0.3)


@contextmanager
def another_run(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that holds the folder, and a worker that it has forked, which outlives it."""
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        yield process, worker
    finally:
        process.kill()
        process.wait()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.usefixtures("impatient")
def test_a_second_run_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with (
        another_run(tmp_path) as (other, _),
        pytest.raises(ValueError, match=rf"^process {other.pid} on \S+ trains in {tmp_path}: wait for it, stop it"),
        sole_run(tmp_path, WORLD),
    ):
        pass


@pytest.mark.usefixtures("impatient")
def test_a_run_that_was_killed_lets_go_though_its_workers_live(tmp_path: Path) -> None:
    with another_run(tmp_path) as (other, worker):
        other.kill()
        other.wait()
        with sole_run(tmp_path, WORLD):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
            os.kill(worker, 0)


def test_one_that_is_ending_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_run(tmp_path) as (other, _):
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
        with sole_run(tmp_path, WORLD):
            assert other.wait() == -signal.SIGKILL
    assert f"process {other.pid} on " in capsys.readouterr().err


def test_where_there_are_no_locks_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without_locks)
    with sole_run(tmp_path / "run", WORLD):
        assert (tmp_path / "run").is_dir()


@pytest.mark.usefixtures("impatient")
def test_training_is_refused_before_anything_is_written(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    with another_run(tmp_path) as (other, _):
        with pytest.raises(ValueError, match=f"^process {other.pid} on "):
            train(make_config(tmp_path))
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
