"""A run that nobody disturbs: what trials are compared with, and how long its steps and saves usually take."""

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pretrain.hooks.metrics import read_metrics
from pretrain.settings import dump_config

from .processes import POLL, Torchrun
from .run_folder import RunFolder
from .tiny_run import tiny_run

LOG = "log.txt"


@dataclass(frozen=True)
class Pace:
    """Seconds that a step and a save usually take, and the whole run with its start."""

    step: float
    save: float
    whole: float


@dataclass(frozen=True)
class Reference:
    """A run's folder, its pace, and the size of its checkpoints."""

    run: Path
    pace: Pace
    checkpoint_bytes: int


def start_command(folder: Path, *poison: str) -> list[str]:
    """What torchrun starts to train, or to go on training, in folder/run; see `poisoned` for the rest."""
    config = folder / "run.yaml"
    config.write_text(dump_config(tiny_run(folder / "run")))
    return ["tools.chaos.poisoned" if poison else "pretrain.train", str(config), *poison]


def undisturbed(folder: Path, *poison: str) -> Reference:
    """Trains in folder/run from the beginning to the end.

    Raises:
        ValueError: it did not end well.
    """
    folder.mkdir(parents=True)
    began, saves = time.monotonic(), dict[int, list[float]]()
    torchrun = Torchrun(start_command(folder, *poison), folder / LOG, folder)
    try:
        run = RunFolder(folder / "run")
        while not torchrun.ended():
            run.look()
            for step in run.saves_under_way():
                saves.setdefault(step, []).append(time.monotonic())
            time.sleep(POLL)
    finally:
        torchrun.end()
    if torchrun.process.returncode:
        raise ValueError(f"the undisturbed run did not end well: see {folder / LOG}")
    steps = [line["seconds"] for line in read_metrics(run.folder / "metrics.jsonl") if line["kind"] == "train"]
    pace = Pace(
        step=statistics.median(after - before for before, after in pairwise(steps)),
        save=statistics.median(times[-1] - times[0] for times in saves.values()) if saves else 0.0,
        whole=time.monotonic() - began,
    )
    files = (path for path in run.sealed()[-1].rglob("*") if path.is_file())
    return Reference(run.folder, pace, sum(path.stat().st_size for path in files))
