"""Runs one untrusted program under limits: a script that `sandbox.run_program` starts with `python -I -S`.

It reads a JSON request {program, seconds, memory_bytes, processes, file_bytes, open_files, paths} on standard
input and writes {status, message, output} on standard output. The program runs in a forked child; the verdict
comes through a pipe and must carry a nonce, so a program that just exits or prints has not passed, nor does a
forged verdict say that there is no sandbox.
"""

import contextlib
import ctypes
import json
import os
import resource
import secrets
import selectors
import signal
import sys
import time
from typing import Any

KEPT_BYTES = 4096
_PR_SET_KEEPCAPS, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 8, 36, 38
_CLONE_NEWUSER, _CLONE_NEWIPC, _CLONE_NEWNET = 0x10000000, 0x08000000, 0x40000000
_CAP_DAC_READ_SEARCH = 1 << 2
_CAPABILITY_VERSION_3 = 0x20080522
_FIRST_UID = 1_000_000


def main() -> None:
    """Serves the one request on standard input."""
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    nonce = secrets.token_hex(16)
    nonce_read, nonce_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    output_read, output_write = os.pipe()
    os.write(nonce_write, nonce.encode())
    os.close(nonce_write)
    child = os.fork()
    if child == 0:
        for descriptor in (verdict_read, output_read):
            os.close(descriptor)
        _become_program(request, libc, nonce_read, verdict_write, output_write)
    for descriptor in (nonce_read, verdict_write, output_write):
        os.close(descriptor)
    kept, ended = _watch(child, {verdict_read, output_read}, time.monotonic() + request["seconds"])
    exit_status = _end(child)
    status, message = _judge(kept[verdict_read], nonce, ended, exit_status)
    output = kept[output_read].decode(errors="replace")
    json.dump({"status": status, "message": message, "output": output}, sys.stdout)


def _become_program(
    request: dict[str, Any], libc: ctypes.CDLL, nonce_read: int, verdict_write: int, output_write: int
) -> None:
    """The child: never returns."""
    try:
        os.setsid()
        _isolate(request, libc)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output_write, 1), (output_write, 2)):
            os.dup2(source, target)
        os.close(null)
        os.close(output_write)
    except BaseException as error:
        _report(verdict_write, "unavailable", os.read(nonce_read, 64).decode() + repr(error))
    sys.path += request["paths"]
    program, spare = request.pop("program"), [bytearray(1 << 20)]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except MemoryError:
        spare.clear()
        _report(verdict_write, "out_of_memory", "MemoryError")
    except BaseException as error:
        spare.clear()
        _report(verdict_write, "failed", _describe(error))
    _report(verdict_write, "passed", os.read(nonce_read, 64).decode())


def _describe(error: BaseException) -> str:
    """The error's type, message and line of the program, on one line."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SystemExit):
        return f"SystemExit before the checks were done{line}"
    return f"{type(error).__name__}: {str(error)[:300]}{line}".replace("\n", " ")


def _report(descriptor: int, status: str, message: str) -> None:
    """Writes the verdict and ends the process without running what the program left for its end."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(descriptor, json.dumps([status, message]).encode()[:KEPT_BYTES])
    os._exit(0)


def _isolate(request: dict[str, Any], libc: ctypes.CDLL) -> None:
    """Drops the network, then root, then resources: each step needs what the next gives up."""
    is_root = os.getuid() == 0
    processes = request["processes"] if is_root else request["processes"] + _tasks_of(os.getuid())
    if libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC)
    if is_root:
        _leave_root(libc)
    _keep_capabilities(libc)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    cpu_seconds = int(request["seconds"]) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_NOFILE, request["open_files"]),
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_NPROC, processes),
    ):
        resource.setrlimit(limit, (value, value))


def _leave_root(libc: ctypes.CDLL) -> None:
    """Becomes a user of its own, since the process limit does not bind root and counts per user."""
    uid = _FIRST_UID + os.getpid()
    libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.chown(".", uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _keep_capabilities(libc: ctypes.CDLL) -> None:
    """Gives up root's powers, except to read any file where the interpreter could not be read without."""
    kept = 0 if os.access(os.__file__, os.R_OK) else _CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)) != 0:
        raise OSError("cannot give up capabilities")


def _tasks_of(uid: int) -> int:
    """Threads that the user has now: what the process limit counts."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                count += len(os.listdir(f"/proc/{entry.name}/task")) if entry.stat().st_uid == uid else 0
    return count


def _watch(child: int, pipes: set[int], deadline: float) -> tuple[dict[int, bytes], bool]:
    """Reads the pipes, keeping KEPT_BYTES of each, until the child ends (True) or time is up (False)."""
    kept = dict.fromkeys(pipes, b"")
    ended = os.pidfd_open(child)
    with selectors.DefaultSelector() as selector:
        for descriptor in (*pipes, ended):
            selector.register(descriptor, selectors.EVENT_READ)
        while (remaining := deadline - time.monotonic()) > 0:
            ready = {key.fd for key, _ in selector.select(remaining)}
            for descriptor in ready & pipes:
                data = os.read(descriptor, 65536)
                kept[descriptor] = (kept[descriptor] + data)[:KEPT_BYTES]
                if not data:
                    selector.unregister(descriptor)
            if ready == {ended}:
                return kept, True
    return kept, False


def _end(child: int) -> int:
    """Kills the child's group and whoever has come to us from it, and returns the child's wait status."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    _, exit_status = os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while True:
            for orphan in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(orphan, signal.SIGKILL)
            os.waitpid(-1, 0)
    return exit_status


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return list(map(int, file.read().split()))


def _judge(verdict: bytes, nonce: str, ended: bool, exit_status: int) -> tuple[str, str]:
    if not ended:
        return "timed_out", "the time limit was reached"
    try:
        status, message = json.loads(verdict)
    except (ValueError, TypeError):
        if os.WIFSIGNALED(exit_status):
            return "crashed", f"killed by {signal.Signals(os.WTERMSIG(exit_status)).name}"
        return "crashed", f"exited with status {os.WEXITSTATUS(exit_status)} before the checks were done"
    if status == "passed":
        return ("passed", "") if message == nonce else ("failed", "a verdict without the nonce")
    if status == "unavailable" and str(message).startswith(nonce):
        return "unavailable", f"the sandbox could not be set up: {message.removeprefix(nonce)}"
    return ("out_of_memory" if status == "out_of_memory" else "failed"), str(message)


if __name__ == "__main__":
    main()
