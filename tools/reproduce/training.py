"""Trains the runs that a table needs, side by side in processes of their own; a finished one is not trained again."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model.size import matched_control
from pretrain.checkpoint.load import CHECKPOINTS, Loaded, load_for_evaluation, newest_good, read_state
from pretrain.config import RunConfig
from pretrain.hooks.metrics import read_metrics
from pretrain.recipes import build
from pretrain.settings import dump_config, load_config
from pretrain.writable import check_writable

POLL_SECONDS = 0.5
LAST_LINES = 15
LOG = "train.log"


@dataclass(frozen=True)
class Job:
    """A run: a recipe with overrides.

    after: name of the job whose weights it starts from.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    after: str | None = None


def matched_to(job: Job) -> str:
    """The override that gives a control as many layers as it needs to be as large as a job's model with its latent."""
    return f"model.backbone.num_layers={matched_control(build(job.recipe, job.overrides).model).backbone.num_layers}"


@dataclass
class Runs:
    """The trained runs of a table by the names of their jobs, loaded when asked for."""

    folder: Path
    loaded: dict[str, Loaded] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_dir()

    def __getitem__(self, name: str) -> Loaded:
        if name not in self.loaded:
            self.loaded[name] = load_for_evaluation(self.folder / name, device=torch.device("cpu"))
        return self.loaded[name]

    def commits(self, name: str) -> list[str]:
        """The commits that a run was trained at, one for each time it was started or resumed."""
        events = read_metrics(self.folder / name / "metrics.jsonl")
        return list(dict.fromkeys(event["commit"] for event in events if "commit" in event))

    def latent(self, name: str) -> dict[str, float]:
        """What the latent of a run does in its last logged step: KL, active units, mutual information; or nothing."""
        with_latent = [r for r in read_metrics(self.folder / name / "metrics.jsonl") if "kl" in r]
        return {key: r[key] for r in with_latent[-1:] for key in ("kl", "active_units", "mutual_information")}

    def seconds(self, name: str, clock: Literal["seconds", "processor_seconds"] = "seconds") -> float:
        """Training time of a run over all of its processes, by the clock on the wall or the processor's own.

        The second is what a run alone on its core would take: the first counts what else the machine was doing.
        """
        total, before = 0.0, 0.0
        for record in read_metrics(self.folder / name / "metrics.jsonl"):
            now = float(record.get(clock, before))
            total, before = total + max(0.0, now - before if now >= before else now), now
        return total


def train_all(jobs: Mapping[str, Job], folder: Path, seed: int) -> Runs:
    """Trains every job under FOLDER/NAME, as many at once as there are cores; whatever ends it ends them all.

    An interrupted run goes on from its newest checkpoint.

    Raises:
        ValueError: a run failed (its last lines are in the message), or the folder holds one with other settings.
    """
    parents = {job.after for job in jobs.values()} - {None}
    assert parents <= jobs.keys(), f"{parents - jobs.keys()} are no jobs"
    arguments = {name: _arguments(name, job, folder, seed) for name, job in jobs.items()}
    configs = {name: build(recipe, overrides) for name, (recipe, *overrides) in arguments.items()}
    finished = {name for name, config in configs.items() if _is_finished(config)}
    order = sorted(configs, key=lambda name: (name not in parents, -_work(configs[name])))
    waiting = [name for name in order if name not in finished]
    running: dict[str, subprocess.Popen[bytes]] = {}
    cores = os.cpu_count() or 1
    at_once = max(1, min(cores, len(jobs)))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bars = {name: progress.add_task(name, total=configs[name].train.steps, start=False) for name in waiting}
        try:
            while waiting or running:
                ready = [name for name in waiting if jobs[name].after in {None, *finished}]
                for name in ready[: at_once - len(running)]:
                    waiting.remove(name)
                    running[name] = _start(configs[name].path, arguments[name], threads=cores // at_once)
                    progress.start_task(bars[name])
                time.sleep(POLL_SECONDS)
                for name, process in list(running.items()):
                    progress.update(bars[name], completed=_steps_logged(configs[name].path))
                    if process.poll() is not None:
                        _refuse_failure(configs[name].path, process.returncode)
                        finished.add(name)
                        del running[name]
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return Runs(folder)


def _arguments(name: str, job: Job, folder: Path, seed: int) -> list[str]:
    """Recipe and overrides of the run in FOLDER/NAME."""
    start = [f"init_from={folder / job.after}"] if job.after is not None else []
    return [job.recipe, *job.overrides, f"folder={folder / name}", f"seed={seed}", *start]


def _work(config: RunConfig) -> int:
    """Roughly how long a run takes, so that long ones start first."""
    return config.train.steps * config.train.batch_tokens


def _is_finished(config: RunConfig) -> bool:
    """Whether all steps are done; the run of a table that has changed since would pass for one of this table."""
    check_writable(config.path / LOG)
    record = config.path / "config.yaml"
    if record.is_file() and (found := load_config(record)) != config:
        wanted = set(dump_config(config).splitlines())
        changed = ", ".join(line.strip() for line in dump_config(found).splitlines() if line not in wanted)
        raise ValueError(f"{config.path} holds a run with other settings ({changed}): delete it to train it anew")
    checkpoint = newest_good(config.path / CHECKPOINTS)
    return checkpoint is not None and read_state(checkpoint).step >= config.train.steps


def _start(folder: Path, arguments: list[str], *, threads: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pretrain.train", *arguments]
    with (folder / LOG).open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _steps_logged(folder: Path) -> int:
    if not (folder / "metrics.jsonl").is_file():
        return 0
    return max((r["step"] for r in read_metrics(folder / "metrics.jsonl") if "step" in r), default=0)


def _refuse_failure(folder: Path, code: int) -> None:
    if code != 0:
        last = "\n".join((folder / LOG).read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise ValueError(f"training {folder} ended with exit code {code}:\n{last}")
