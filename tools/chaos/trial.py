"""One trial: a run under torchrun, disturbed as drawn, started again until it has ended."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.checkpoint.manifest import MANIFEST

from .damage import damage_file
from .disk import fill, free
from .faults import Damage, Fault, FillDisk, Kill, Terminate, Trial, Victim
from .processes import POLL, Torchrun, is_alive, kill
from .reference import LOG, Reference
from .run_folder import RunFolder, step_of
from .tiny_run import STEPS

MOST_STARTS = 8


class Stuck(Exception):
    """A trial that does not get on; the message says where."""


@dataclass
class History:
    """What happened in a trial.

    Args:
        kills, kills_in_save: strikes that ended processes, and those of them during a save.
        missed: faults that came after the end of the run.
        goes_on_from: for every restart, the steps of the checkpoints that are the newest good one.
        at_least: in the place of it, where torchrun starts as often as it likes.
        problems: what was lost on the way.
    """

    kills: int = 0
    kills_in_save: int = 0
    missed: int = 0
    goes_on_from: list[set[int]] = field(default_factory=list)
    at_least: int | None = None
    problems: list[str] = field(default_factory=list)


class Disturbance:
    """Trains in folder/run and does to it what was drawn.

    Args:
        command: see `start_command`.
        reference: a run like it, undisturbed.
    """

    def __init__(self, trial: Trial, folder: Path, command: list[str], reference: Reference) -> None:
        self.trial, self.folder, self.command, self.pace = trial, folder, command, reference.pace
        self.checkpoint_bytes = reference.checkpoint_bytes
        self.patience = max(300.0, 20 * self.pace.whole)
        self.run, self.history, self.starts = RunFolder(folder / "run"), History(), 0

    def to_the_end(self) -> None:
        """Lets the run begin, disturbs it, and waits until it has ended well.

        Raises:
            Stuck: it does not get on.
        """
        self._start()
        try:
            for fault in self.trial.faults:
                self._strike(fault)
            while not self._has_finished():
                self._start()
        finally:
            self.torchrun.end()

    def _start(self) -> None:
        self.starts += 1
        if self.starts > MOST_STARTS:
            raise Stuck(f"it was started {MOST_STARTS} times and has not finished")
        self.torchrun = Torchrun(self.command, self.folder / LOG, self.folder)

    def _has_finished(self) -> bool:
        """Waits for the end; False where a full disk has led to it, and it has to be started again."""
        self._until(lambda: False)
        if self.torchrun.process.returncode and self.history.at_least is None:
            raise Stuck(f"torchrun ended with {self.torchrun.process.returncode} unasked")
        return self.torchrun.process.returncode == 0

    def _strike(self, fault: Fault) -> None:
        strikes: dict[type, Callable[..., bool]] = {
            Kill: self._kill,
            Terminate: self._terminate,
            FillDisk: self._fill_disk,
            Damage: self._damage,
        }
        self.history.missed += not strikes[type(fault)](fault)

    def _kill(self, fault: Kill) -> bool:
        into_save = fault.into_save
        if not self._reaches(fault.moment, saving=into_save is not None):
            return False
        if into_save is not None:
            time.sleep(into_save * self.pace.save)
        ranks = self.torchrun.ranks()
        if not self._end(ranks, fault.victim):
            return False
        saved = self.run.newest_step()
        if fault.victim != "everything" and not self._is_started_again(ranks):
            return False
        self._goes_on_from({saved})
        return True

    def _end(self, ranks: dict[int, int], victim: Victim) -> bool:
        """Kills the victim, waits until no rank is left, and keeps count; False where there is no victim."""
        if victim == "everything":
            victims = self.torchrun.everything()
        else:
            victims = [number for rank, number in ranks.items() if victim in (rank, "ranks")]
        if not kill(number for number in victims if is_alive(number)):
            return False
        self.run.look()
        self.history.kills += 1
        self.history.kills_in_save += bool(self.run.saves_under_way())
        self._until(lambda: not any(map(is_alive, ranks.values())), what="the ranks outlive one of them")
        if victim == "everything":
            self.torchrun.end()
        self.run.expect_start()
        return True

    def _is_started_again(self, before: dict[int, int]) -> bool:
        """Waits for torchrun's new ranks; False where the old ones had already done everything."""
        self._until(lambda: bool(set(self.torchrun.ranks().values()) - set(before.values())))
        code = self.torchrun.process.poll()
        if code:
            raise Stuck(f"torchrun ended with {code} instead of starting the ranks again")
        return code is None

    def _terminate(self, fault: Terminate) -> bool:
        """Nothing at all may be lost."""
        if not self._reaches(fault.moment):
            return False
        targets: dict[Victim, int] = {"torchrun": self.torchrun.process.pid}
        targets.update(self.torchrun.ranks().items())
        if fault.victim not in targets or not kill([targets[fault.victim]], signal.SIGTERM):
            return False
        self._until(lambda: False, what="the run has not stopped")
        self.run.look()
        if self.torchrun.process.returncode == 0:
            return False
        self.torchrun.end()
        saved = self.run.newest_step()
        if (self.run.last_event, saved) != ("stop", self.run.step):
            self.history.problems.append(
                f"after SIGTERM in step {self.run.step} its last event is {self.run.last_event!r} and its newest "
                f"checkpoint that of step {saved}"
            )
        self.run.expect_start()
        self._goes_on_from({saved})
        return True

    def _fill_disk(self, fault: FillDisk) -> bool:
        """The newest checkpoint stays, and the run goes on, unless it is at its end."""
        if not self._reaches(fault.moment):
            return False
        before = self.history.at_least = self.run.newest_step()
        fill(self.run.folder, int(fault.room * self.checkpoint_bytes))
        ends = time.monotonic() + fault.lasts * STEPS * self.pace.step
        self._until(lambda: time.monotonic() > ends)
        if self.run.newest_step() < before:
            self.history.problems.append(f"the full disk has cost the checkpoint of step {before}")
        free(self.run.folder)
        return True

    def _damage(self, fault: Damage) -> bool:
        if not self._reaches(fault.moment, sealed=2):
            return False
        if not self._end(self.torchrun.ranks(), "everything"):
            return False
        *others, newest = self.run.sealed()
        damaged = damage_file(newest, fault.how, fault.file, fault.position)
        good = {max(map(step_of, others))}
        # The seal seals itself with its form alone: a bit in what only people read of it spoils nothing.
        self._goes_on_from(good | {step_of(newest)} if damaged.name == MANIFEST else good)
        return True

    def _goes_on_from(self, steps: set[int]) -> None:
        self.history.goes_on_from.append(steps)
        if self.torchrun.ended():
            self._start()

    def _reaches(self, moment: float, *, saving: bool = False, sealed: int = 0) -> bool:
        """Waits until the run is there, and a save has begun, or so many are sealed; False: it ended before."""
        step = int(moment * STEPS)

        def is_there() -> bool:
            if self.run.step is None or self.run.step < step:
                return False
            if saving:
                return any(begun >= step for begun in self.run.saves_under_way())
            return len(self.run.sealed()) >= sealed

        if not self._until(is_there):
            return False
        if not saving:
            time.sleep((moment * STEPS - step) * self.pace.step)
        return True

    def _until(self, condition: Callable[[], bool], *, what: str = "the run does not get on") -> bool:
        """Waits; False where torchrun has ended before.

        Raises:
            Stuck: for too long.
        """
        gives_up = time.monotonic() + self.patience
        while not condition():
            if self.torchrun.ended():
                return condition()
            if time.monotonic() > gives_up:
                raise Stuck(f"{what}, for {self.patience:.0f} s, at step {self.run.step}")
            time.sleep(POLL)
            self.run.look()
        return True
