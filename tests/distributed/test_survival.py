"""Two processes are stopped, lose one another, meet an error or a spike on one of them: all decide alike and go on."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.load import load_for_evaluation
from pretrain.config import RunConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.hooks.spans import read_spans
from pretrain.parallel import mesh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("poisoned_training.py")
INTERRUPTED = Path(__file__).with_name("interrupted_training.py")
STOPPED_AT = 5
"""The step in which INTERRUPTED's last rank is told to stop, or raises an error."""
A_MINUTE_AND_MORE = 150.0
"""Seconds: what an error leaves for cleaning up, what torchrun leaves the other rank, and some for a busy machine."""
SETTINGS = ("train.steps=40", "checkpoint.every=10", "validation.every=20", "data.num_workers=1")
Trace = dict[int, dict[str, Any]]
Start = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
) -> Start:
    """Names a run: its configuration file and its folder."""
    folder = tmp_path_factory.mktemp("survival")

    def prepare(name: str, *overrides: str) -> tuple[Path, Path]:
        config = make_config(folder / name, *SETTINGS, *overrides)
        return write_config(config, folder / f"{name}.yaml"), config.path

    return prepare


@contextmanager
def torchrun(*arguments: str | Path, max_restarts: int = 0) -> Iterator["subprocess.Popen[str]"]:
    """Two processes under torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, f"--max-restarts={max_restarts}", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def run(*arguments: str | Path) -> None:
    with torchrun(*arguments) as process:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]


def wait_for_step(process: "subprocess.Popen[str]", folder: Path, step: int) -> None:
    """Until a line tells of the step."""
    while process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and any(
            line["kind"] == "train" and line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")
        ):
            return
        time.sleep(0.01)
    pytest.fail(process.communicate()[1][-4000:])


def rank_1_of(process: "subprocess.Popen[str]") -> int:
    """Its process number."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("there is no rank 1")


def events(folder: Path) -> list[str]:
    return [line["event"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "event"]


@pytest.mark.timeout(900)
def test_a_run_of_two_processes_survives_what_happens_to_it(prepared: Start, trace: Callable[[Path], Trace]) -> None:
    """torchrun is terminated, a rank gets a signal, one is killed: the losses are those of an undisturbed run."""
    config, undisturbed = prepared("undisturbed")
    run("-m", "pretrain.train", config)
    assert {rank: lines[-1]["step"] for rank, lines in read_spans(undisturbed / "spans").items()} == {0: 40, 1: 40}
    config, folder = prepared("disturbed")
    terminate_torchrun(config, folder, step=5)
    signal_one_rank(config, folder, step=15)
    kill_one_rank(config, folder, step=25)
    assert sorted(trace(folder)) == list(range(1, 41))
    assert trace(folder) == trace(undisturbed)


def terminate_torchrun(config: Path, folder: Path, *, step: int) -> None:
    """It passes the signal on to the process groups of its children, loader workers included; they save."""
    with torchrun("-m", "pretrain.train", config) as process:
        wait_for_step(process, folder, step)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert events(folder)[-2:] == ["checkpoint", "stop"], errors[-4000:]
    assert load_for_evaluation(folder).state.step >= step


def signal_one_rank(config: Path, folder: Path, *, step: int) -> None:
    """All stop; torchrun, which could start them again, does not."""
    with torchrun("-m", "pretrain.train", config, max_restarts=3) as process:
        wait_for_step(process, folder, step)
        os.kill(rank_1_of(process), signal.SIGUSR1)
        process.communicate()
    assert process.returncode != 0
    assert events(folder)[-2:] == ["checkpoint", "stop"]
    assert events(folder).count("resume") == 1
    assert load_for_evaluation(folder).state.step >= step


def kill_one_rank(config: Path, folder: Path, *, step: int) -> None:
    """The other one ends by itself, not after the hour that ranks wait for one another, and both are started again."""
    with torchrun("-m", "pretrain.train", config, max_restarts=1) as process:
        wait_for_step(process, folder, step)
        os.kill(rank_1_of(process), signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    assert events(folder).count("resume") == 3
    assert events(folder)[-1] == "finish"


@pytest.mark.timeout(900)
def test_a_spike_on_one_rank_is_answered_by_all(
    prepared: Start, trace: Callable[[Path], Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one process answers it."""
    policies = ("skip", "rollback", "stop")
    short = ("train.steps=8", "validation.every=0", "checkpoint.every=4", "data.num_workers=0")
    paths = {
        (policy, size): prepared(f"{policy}-{size}", f"train.on_spike={policy}", *short)
        for policy in policies
        for size in (1, 2)
    }
    run(DRIVER, *(paths[policy, 2][0] for policy in policies))
    for name in ("forward_backward", "reduce_and_clip"):
        monkeypatch.setattr(FsdpEngine, name, getattr(FsdpEngine, name))
    monkeypatch.setattr(mesh, "process_mesh", mesh.process_mesh)
    runpy.run_path(str(DRIVER))["main"]([str(paths[policy, 1][0]) for policy in policies])
    for policy in policies:
        one, two = (paths[policy, size][1] for size in (1, 2))
        assert events(one) == events(two)
        ours, theirs = trace(two), trace(one)
        assert sorted(ours) == sorted(theirs)
        for step, line in theirs.items():
            assert ours[step]["train.loss"] == pytest.approx(line["train.loss"], rel=1e-5)
            assert ours[step]["train.skipped"] == line["train.skipped"]
    assert {policy: events(paths[policy, 2][1])[-1] for policy in policies} == {
        "skip": "finish",
        "rollback": "finish",
        "stop": "stop",
    }
    skipped, rolled_back = (load_for_evaluation(paths[policy, 2][1]).state for policy in ("skip", "rollback"))
    assert (skipped.skipped, skipped.passed_over) == (1, [])
    assert (rolled_back.skipped, rolled_back.passed_over) == (0, [(4, 6)])


@pytest.mark.timeout(900)
def test_every_engine_stops_and_goes_on_and_an_error_on_one_rank_ends_both(
    prepared: Start, trace: Callable[[Path], Trace]
) -> None:
    """One test, because processes are expensive to start: two pairs do all of it."""
    short = ("train.steps=8", "validation.every=0", "checkpoint.every=0")
    engines = {"deepspeed": ("engine=deepspeed",), "megatron": ("engine=megatron", "parallel.tensor=2")}
    paths = {
        (engine, fate): prepared(f"{engine}-{fate}", *settings, *short)
        for engine, settings in engines.items()
        for fate in ("undisturbed", "stopped")
    }
    broken, broken_folder = prepared("broken", *short)
    deepspeed, megatron = (paths[engine, "stopped"] for engine in engines)
    whole = [paths[engine, "undisturbed"][0] for engine in engines]
    with torchrun(INTERRUPTED, *whole, f"{megatron[0]}=stop", megatron[0], f"{deepspeed[0]}=stop") as process:
        _, errors = process.communicate()
    assert "exitcode  : 75" in errors, errors[-4000:]
    assert events(deepspeed[1])[-2:] == ["checkpoint", "stop"]
    assert max(trace(deepspeed[1])) == load_for_evaluation(deepspeed[1]).state.step == STOPPED_AT
    fail_on_one_rank(f"{broken}=raise", broken_folder, before=deepspeed[0])
    for engine in engines:
        undisturbed, stopped = (paths[engine, fate][1] for fate in ("undisturbed", "stopped"))
        assert events(stopped).count("stop") == events(stopped).count("resume") == 1
        assert sorted(trace(stopped)) == list(range(1, 9))
        assert trace(stopped) == trace(undisturbed), engine


def fail_on_one_rank(config: str, folder: Path, *, before: Path) -> None:
    """The other one does not wait for it for the hour that ranks wait for one another; another run goes before."""
    with torchrun(INTERRUPTED, before, config) as process:
        wait_for_step(process, folder, STOPPED_AT - 1)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        _, errors = process.communicate(timeout=A_MINUTE_AND_MORE)
    assert "RuntimeError: out of memory, as it were" in errors, errors[-4000:]
    assert "exitcode  : 1 " in errors
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
