"""A loop that stalls is described and ended; one that lives is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.endings import Ending

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import ctypes, sys, threading, time
from pathlib import Path
from pretrain.hooks.watchdog import Watchdog, end_within
from pretrain.state import TrainState

def waits_for_a_lost_rank():
    time.sleep(60)

def another_thread():
    time.sleep(60)

def lives(watchdog):
    for _ in range(50):
        time.sleep(0.05)
        watchdog.on_alive()

def holds_the_interpreter():
    ctypes.PyDLL(None).sleep(60)

watchdog = Watchdog(Path(sys.argv[1]), 3, 2.0, grace=1.0)
watchdog.on_start(TrainState(), resumed=False)
threading.Thread(target=another_thread, daemon=True).start()
"""


def run(folder: Path, body: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", LOOP + body, str(folder)], env=environment, capture_output=True, text=True, timeout=250
    )


@pytest.mark.parametrize("before", ["", "lives(watchdog)\n"])
def test_a_stall_is_written_down_and_ends_the_process(tmp_path: Path, before: str) -> None:
    result = run(tmp_path / "stalls", f"{before}waits_for_a_lost_rank()")
    assert result.returncode == Ending.STALLED
    (path,) = (tmp_path / "stalls").iterdir()
    assert path.name.startswith("rank-3-")
    for text in (path.read_text(), result.stderr):
        assert "in waits_for_a_lost_rank" in text
        assert "in another_thread" in text
        assert "in lives" not in text
    assert f"penumbra: rank 3: no step for 0.0333333 minutes, the stacks are in {path}" in result.stderr


def test_signs_of_life_keep_it_quiet(tmp_path: Path) -> None:
    """For longer than the limit, and for longer again after the run is over."""
    result = run(tmp_path, "lives(watchdog)\nwatchdog.on_finish(TrainState())\ntime.sleep(4)\nprint('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
    assert not list(tmp_path.iterdir())


def test_a_thread_that_holds_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    result = run(tmp_path, "holds_the_interpreter()")
    assert result.returncode == 1
    assert "in holds_the_interpreter" in result.stderr


def test_a_folder_that_takes_nothing_does_not_save_the_process(tmp_path: Path) -> None:
    (tmp_path / "stalls").touch()
    result = run(tmp_path / "stalls", "waits_for_a_lost_rank()")
    assert result.returncode == Ending.STALLED
    assert "in waits_for_a_lost_rank" in result.stderr


def test_an_end_is_forced_where_cleaning_up_hangs(tmp_path: Path) -> None:
    result = run(tmp_path, "watchdog.on_error(ValueError())\nend_within(0.5)\nwaits_for_a_lost_rank()")
    assert result.returncode == 1
