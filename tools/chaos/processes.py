"""torchrun and what it starts: found in /proc, where everything of a trial carries its mark, and ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from .faults import NUM_RANKS

ROOT = Path(__file__).resolve().parents[2]
PROC = Path("/proc")
MARK = "PENUMBRA_CHAOS"
MAX_RESTARTS = 5
POLL = 0.002
"""Seconds between looks at a run."""


def refuse_without_proc() -> None:
    """Raises ValueError where processes can not be found by what they were started with."""
    if not (PROC / "self" / "environ").exists():
        raise ValueError(
            "`penumbra chaos` finds the processes that it kills in /proc, which is not here: run it on Linux"
        )


class Torchrun:
    """Two ranks under torchrun, which starts them again when one is lost.

    Args:
        arguments: a module and what it takes.
        log: its output is appended there.
        trial: its folder, by which its processes are told from all others.
    """

    def __init__(self, arguments: Sequence[str], log: Path, trial: Path) -> None:
        self.mark = _mark(trial)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
        options = [f"--max-restarts={MAX_RESTARTS}", "--shutdown-timeout=300"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *options, "-m", *arguments],
                env=environment | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether torchrun has."""
        return self.process.poll() is not None

    def ranks(self) -> dict[int, int]:
        """Process numbers by rank; loader workers, which are children of ranks, are not among them."""
        found = {}
        with suppress(OSError):
            for child in (PROC / f"{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                for entry in _environment(int(child)):
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(child)
        return found

    def everything(self) -> list[int]:
        """torchrun, ranks and their children, orphans included."""
        return _marked(lambda mark: mark == self.mark)

    def end(self) -> None:
        """Kills all of it, and waits until it is gone."""
        while alive := self.everything():
            kill(alive)
            time.sleep(POLL)
        self.process.wait()


def left_over(folder: Path) -> list[int]:
    """Processes of trials below a folder that still run, although the chaos that started them may be gone."""
    return _marked(lambda mark: mark.startswith(_mark(folder) + os.sep))


def kill(numbers: Iterable[int], number_of_signal: signal.Signals = signal.SIGKILL) -> int:
    """Sends a signal to processes, and counts those that were there."""
    count = 0
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, number_of_signal)
            count += 1
    return count


def is_alive(number: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return (PROC / f"{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _mark(folder: Path) -> str:
    return str(folder.resolve())


def _marked(wanted: Callable[[str], bool]) -> list[int]:
    numbers = [int(path.name) for path in PROC.iterdir() if path.name.isdigit()]
    return [number for number in numbers if any(map(wanted, _marks(number))) and is_alive(number)]


def _marks(number: int) -> list[str]:
    prefix = f"{MARK}=".encode()
    return [os.fsdecode(entry[len(prefix) :]) for entry in _environment(number) if entry.startswith(prefix)]


def _environment(number: int) -> list[bytes]:
    try:
        return (PROC / f"{number}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
