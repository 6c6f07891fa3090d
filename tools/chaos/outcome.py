"""What became of a trial: the same to the last bit as a run that nobody disturbed, or what is different."""

import json
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.hooks.metrics import read_metrics

from .comparison import Point, differences
from .disk import small_disk
from .faults import FillDisk, Poison, Trial
from .reference import Reference, start_command, undisturbed
from .run_folder import RunFolder
from .tiny_run import SAVE_EVERY, STEPS
from .trial import Disturbance, History, Stuck


@dataclass
class Outcome:
    """A trial that is over.

    Args:
        problems: how the run differs from an undisturbed one, and what it lost; none is how it should be.
        restarts: how often it went on, started by torchrun or by us.
        repeated: steps that were computed once more.
        saves_lost: checkpoints of the schedule that a full disk did not take.
    """

    trial: Trial
    history: History
    problems: list[str] = field(default_factory=list)
    restarts: int = 0
    repeated: int = 0
    saves_lost: int = 0
    seconds: float = 0.0


def conduct(trial: Trial, folder: Path, reference: Reference) -> Outcome:
    """Runs a trial in a folder, which stays only if there are problems."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    poison = () if trial.poison is None else (str(poisoned_step(trial.poison)), str(trial.poison.rank))
    with _disk(trial, folder):
        disturbance = Disturbance(trial, folder, start_command(folder, *poison), reference)
        outcome = Outcome(trial, disturbance.history)
        try:
            disturbance.to_the_end()
            _judge(outcome, folder, reference)
        except Stuck as stuck:
            outcome.problems.append(str(stuck))
    outcome.seconds = time.monotonic() - began
    if outcome.problems:
        (folder / "trial.json").write_text(json.dumps(asdict(outcome), indent=1, default=sorted))
    else:
        shutil.rmtree(folder)
    return outcome


def poisoned_step(poison: Poison) -> int:
    """The step, counted from 1."""
    return 1 + int(poison.moment * STEPS)


def _disk(trial: Trial, folder: Path) -> AbstractContextManager[None]:
    fills = any(isinstance(fault, FillDisk) for fault in trial.faults)
    return small_disk(folder / "run") if fills else nullcontext()


def _judge(outcome: Outcome, folder: Path, reference: Reference) -> None:
    """Puts what is wrong into the outcome, and what can be counted."""
    run, lines = RunFolder(folder / "run"), read_metrics(folder / "run" / "metrics.jsonl")
    run.look()
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    outcome.restarts, outcome.repeated = len(run.starts) - 1, len(steps) - len(set(steps))
    if outcome.history.at_least is not None:
        saved = {line["step"] for line in lines if line.get("event") == "checkpoint"}
        outcome.saves_lost = len(set(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)) - saved)
    outcome.problems += outcome.history.problems
    outcome.problems += start_problems(run.starts, outcome.history)
    if outcome.trial.poison is None:
        outcome.problems += differences(run.folder, reference.run)
        return
    step = poisoned_step(outcome.trial.poison)
    skipped = {line["skipped"] for line in lines if line["kind"] == "train" and line["step"] >= step}
    if skipped != {1}:
        outcome.problems.append(f"from step {step} on 1 step should be skipped, the log says {sorted(skipped)}")
    left_out = undisturbed(folder / "left-out", str(step), "none")
    outcome.problems += differences(run.folder, left_out.run, apart_from=told_of_a_skip(step))


def start_problems(starts: list[int], history: History) -> list[str]:
    """Restarts that did not go on from the newest sealed checkpoint, or that nothing has led to.

    starts: the steps at which the run was started, in order.
    """
    first, *others = starts
    if history.at_least is not None:
        return [f"it went on from step {n}, not {history.at_least}" for n in others if n < history.at_least]
    if first or len(others) != len(history.goes_on_from):
        return [f"it was started at steps {starts}, after {len(history.goes_on_from)} interruptions"]
    return [
        f"restart {number} went on from step {start}, the newest sealed checkpoint was of step {max(good)}"
        for number, (start, good) in enumerate(zip(others, history.goes_on_from), start=1)
        if start not in good
    ]


def told_of_a_skip(step: int) -> set[Point]:
    """What a run says of a step that it has skipped, and another where the update was left out unasked does not."""
    skipped: set[Point] = {("train", later, "skipped") for later in range(step, STEPS + 1)}
    state: set[Point] = {("state", STEPS, name) for name in ("skipped", "typical_norm", "num_norms")}
    return {("train", step, "grad_norm"), *skipped, *state}
