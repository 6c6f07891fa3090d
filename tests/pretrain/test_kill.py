"""A run that is killed, again and again, logs the same losses as one that is left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation
from pretrain.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
KILLS = 5
STEPS = 35


def start(path: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pretrain.train", str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(process: "subprocess.Popen[bytes]", happened: Callable[[], bool]) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_and_resume_gives_the_bit_identical_trace(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
    trace: Callable[[Path], dict[int, dict[str, Any]]],
) -> None:
    settings = [f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=2", "data.num_workers=1"]
    settings += ["validation.every=10"]
    whole, killed = (make_config(tmp_path / name, *settings) for name in ("whole", "killed"))
    assert start(write_config(whole, tmp_path / "whole.yaml")).wait() == 0

    rng = random.Random(0)
    folder, path = killed.path / CHECKPOINTS, write_config(killed, tmp_path / "killed.yaml")
    for number in range(KILLS):
        process = start(path)
        step = STEPS * (number + 1) // (KILLS + 2) + rng.randrange(3)
        if number % 2:
            wait_for(process, (folder / f"step-{step:08d}.tmp").exists)
        else:
            wait_for(process, (folder / f"step-{step:08d}").exists)
            time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    process = start(path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert sorted(trace(killed.path)) == list(range(1, STEPS + 1))
    assert trace(killed.path) == trace(whole.path)
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:08d}" for n in (STEPS - 1, STEPS)]
    assert load_for_evaluation(killed.path).state.resumes >= 1
    ours, theirs = (dict(load_for_evaluation(c.path).model.named_parameters()) for c in (killed, whole))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
