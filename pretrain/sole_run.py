"""One run at a time in a folder: two that trained there would overwrite each other's checkpoints and records."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from .notice import notice

if TYPE_CHECKING:
    from .parallel.mesh import Axis

LOCK = ".lock"
PATIENCE = 120.0
"""Seconds in which a run may still be ending, or a file server still waits for a machine that is gone."""


@contextmanager
def sole_run(folder: Path, world: "Axis") -> Iterator[None]:
    """Makes the run's folder and holds it; however the process ends, the system lets go of it.

    Another run that ends within PATIENCE is waited for. Where the file system has no locks nothing is held.

    Raises:
        ValueError: on every rank: the folder can not be made, or another run trains there (its process is named).
    """
    with ExitStack() as held:
        obstacle = world.from_first(lambda: _hold(folder, held))
        if obstacle is not None:
            raise ValueError(obstacle)
        yield


def _hold(folder: Path, held: ExitStack) -> str | None:
    """What is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(FileIO(folder / LOCK, "a+"))
    except OSError as error:
        return f"the run's folder {folder} can not be made ({error}): choose another with folder=..."
    if not _locked(lock):
        notice(f"{_holder(lock)} trains in {folder}: waiting up to {PATIENCE:.0f} s for its end")
        until = time.monotonic() + PATIENCE
        while not _locked(lock):
            if time.monotonic() > until:
                return (
                    f"{_holder(lock)} trains in {folder}: wait for it, stop it (SIGTERM saves a checkpoint), or "
                    "choose another folder with folder=..."
                )
            time.sleep(0.1)
    with suppress(OSError):  # a full disk is the checkpoints' to refuse
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return None


def _locked(lock: FileIO) -> bool:
    """Whether nobody else holds the file, or nobody can; forked loader workers do not inherit what lockf holds."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some network file systems say the second
        return False
    except OSError:
        pass
    return True


def _holder(lock: FileIO) -> str:
    lock.seek(0)
    return lock.read().decode(errors="replace") or "another process"
