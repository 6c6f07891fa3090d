"""What programs may not do, and what counts as having passed."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from eval.code import Limits, require_sandbox, run_many, run_program

LIMITS = Limits(seconds=20.0, memory_bytes=256 << 20, processes=8, file_bytes=1 << 20)
SHORT = Limits(seconds=1.0)


def test_a_program_that_ends_passes() -> None:
    outcome = run_program("import math, json\nprint(math.factorial(5))\n", limits=LIMITS)
    assert (outcome.status, outcome.output) == ("passed", "120\n")


def test_a_failed_check_is_told_with_its_line() -> None:
    outcome = run_program("x = 1\nassert x == 2, 'not two'\n", limits=LIMITS)
    assert (outcome.status, outcome.message) == ("failed", "AssertionError: not two (line 2)")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("x = (", "failed"),
        ("import sys\nsys.exit(0)", "failed"),
        ("raise SystemExit", "failed"),
        ("import os\nos._exit(0)", "crashed"),
        ("import os\nos.kill(os.getpid(), 9)", "crashed"),
        ("import ctypes\nctypes.string_at(0)", "crashed"),
        ("def f():\n    return f()\nf()", "failed"),
        ("input()", "failed"),
    ],
)
def test_ending_early_is_not_passing(program: str, status: str) -> None:
    assert run_program(program, limits=LIMITS).status == status


def test_a_sandbox_that_can_not_be_set_up_is_no_failure_of_the_program() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    outcome = run_program("pass", limits=Limits(open_files=hard + 1))
    assert outcome.status == "unavailable"
    assert "the sandbox could not be set up: ValueError" in outcome.message
    with pytest.raises(ValueError, match="can not be run here"):
        require_sandbox(Limits(open_files=hard + 1))


@pytest.mark.parametrize(
    "forged", ['["passed", ""]', '["unavailable", "0123"]', '["passed", "0123"]', "passed", "[]", "{}"]
)
def test_a_verdict_written_by_the_program_does_not_count(forged: str) -> None:
    program = f"""
import os
for descriptor in range(64):
    try:
        os.write(descriptor, {forged!r}.encode())
    except OSError:
        pass
os._exit(0)
"""
    assert run_program(program, limits=LIMITS).status in ("failed", "crashed")


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(100)",
        "import signal\nsignal.pthread_sigmask(2, range(1, 64))\nsignal.pause()",
    ],
)
def test_an_endless_program_is_ended(program: str) -> None:
    assert run_program(program, limits=SHORT).status == "timed_out"


def test_memory_is_limited() -> None:
    outcome = run_program("blocks = []\nwhile True:\n    blocks.append(bytes(10**7))", limits=LIMITS)
    assert outcome.status == "out_of_memory"


def test_files_are_limited() -> None:
    outcome = run_program("open('big', 'wb').write(bytes(10**7))\nassert False", limits=LIMITS)
    assert outcome.status == "failed"
    assert "File too large" in outcome.message


def test_open_files_are_limited() -> None:
    outcome = run_program("files = [open('/dev/null') for _ in range(1000)]", limits=LIMITS)
    assert "Too many open files" in outcome.message


def test_processes_are_limited() -> None:
    program = "import os, time\nfor _ in range(1000):\n    if os.fork() == 0:\n        time.sleep(100)\n"
    outcome = run_program(program, limits=LIMITS)
    assert outcome.status == "failed"
    assert "BlockingIOError" in outcome.message


def test_a_fork_bomb_leaves_no_process_behind() -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert run_program(bomb, limits=SHORT).status == "timed_out"
    assert not supervisors()


def test_a_process_that_left_its_session_is_ended() -> None:
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(300)
    os._exit(0)
os.wait()
"""
    assert run_program(program, limits=LIMITS).status == "passed"
    assert not supervisors()


def supervisors() -> list[int]:
    """Children of this process, and theirs, that run the supervisor; those just ended get a moment to go."""
    for _ in range(100):
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and b"supervisor.py" in _command_line(entry) and _is_ours(int(entry.name)):
                found.append(int(entry.name))
        if not found:
            return []
        time.sleep(0.05)
    for process in found:
        os.kill(process, signal.SIGKILL)
    return found


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _is_ours(process: int) -> bool:
    """Whether this process is its ancestor, or it lost its parent."""
    while process > 1:
        if process == os.getpid():
            return True
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == 1


def test_a_flood_of_output_is_cut() -> None:
    outcome = run_program("for _ in range(1000):\n    print('x' * 10_000)\n", limits=LIMITS)
    assert outcome.status == "passed"
    assert 0 < len(outcome.output) <= 4096


def test_environment_and_working_directory_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    program = "import os\nassert 'SECRET_TOKEN' not in os.environ\nassert os.listdir() == []\n"
    program += "open('a', 'w').close()\nprint(os.getcwd())"
    outcome = run_program(program, limits=LIMITS)
    assert outcome.status == "passed", outcome.message
    folder = Path(outcome.output.strip())
    assert folder != Path.cwd()
    assert not folder.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can write there to begin with")
def test_root_is_given_up() -> None:
    program = "import os\nassert os.getuid() != 0\nopen('/etc/written-by-a-program', 'w')"
    assert "PermissionError" in run_program(program, limits=LIMITS).message
    assert "PermissionError" in run_program("import os\nos.setuid(0)", limits=LIMITS).message


def test_many_programs_keep_their_order() -> None:
    programs = [f"assert {number} % 3" for number in range(12)]
    outcomes = run_many(programs, limits=LIMITS, workers=2)
    assert [outcome.status == "passed" for outcome in outcomes] == [bool(number % 3) for number in range(12)]


def test_limits_and_workers_must_be_positive() -> None:
    with pytest.raises(ValueError, match="memory_bytes must be greater than 0, got 0"):
        Limits(memory_bytes=0)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        run_many(["pass"], limits=LIMITS, workers=0)
