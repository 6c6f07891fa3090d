"""Executes untrusted programs, each in a process of its own under limits.

Isolated: time (the program and every process it started are killed), memory, number of processes (for root
too: the program runs as a user of its own), file sizes, open files, environment (empty), working directory
(temporary) and, where the kernel allows new namespaces, network and IPC.

Not isolated: the program can read the files the user can read (as root: what everybody can, or all files
where the interpreter is readable by root only), can write where the user can (as root: where everybody can),
and sees other processes. Memory is limited per process, not in total. A program that sets out to deceive its
judge from inside the interpreter can. For code you distrust more than a model's guesses, run the whole
evaluation in a container or under bubblewrap. Linux only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_GRACE_SECONDS = 10.0

Status = Literal["passed", "failed", "timed_out", "out_of_memory", "crashed", "unavailable"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use; `seconds` is wall-clock time, `memory_bytes` counts address space."""

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    processes: int = 16
    file_bytes: int = 16 << 20
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"sandbox limit {name} must be greater than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended; `passed` only if it ran to its end. `output` is the start of what it printed.

    `unavailable`: it was not run, because its limits could not be set up.
    """

    status: Status
    message: str = ""
    output: str = ""


def run_program(program: str, *, limits: Limits) -> Outcome:
    """Runs a program; it passes if it reaches its end without an exception, an exit or a limit."""
    if sys.platform != "linux":
        raise ValueError(f"programs can be run on linux only, this is {sys.platform}; use a Linux container")
    site = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    request = json.dumps({"program": program, "paths": site, **asdict(limits)})
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            reply, _ = process.communicate(request.encode(), timeout=limits.seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            reply = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    try:
        return Outcome(**json.loads(reply))
    except ValueError:
        return Outcome(status="crashed", message="the sandbox itself was ended")


def require_sandbox(limits: Limits) -> None:
    """Runs an empty program, so that a machine without a sandbox is not taken for programs that fail.

    Raises:
        ValueError: the empty program did not pass.
    """
    outcome = run_program("pass", limits=limits)
    if outcome.status != "passed":
        raise ValueError(
            f"programs can not be run here (an empty one ended as {outcome.status}: {outcome.message}): "
            "raise --seconds if the time is too short, else use a Linux machine or container with pidfd_open "
            "that lets a process lower its own limits"
        )


def run_many(programs: Sequence[str], *, limits: Limits, workers: int) -> list[Outcome]:
    """Runs programs, `workers` at a time; outcomes in the order of the programs."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run_program(program, limits=limits), programs))
