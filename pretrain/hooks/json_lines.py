"""Files of one JSON object a line, which a kill may cut off anywhere and a full disk may hold up."""

import errno
import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..notice import notice

MOST_WAITING = 10_000
"""Lines that wait for the disk; beyond them the oldest are lost."""


class JsonLines:
    """Appends objects to a file; what the disk does not take waits in memory for the next one, and the run goes on.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[str] = deque(maxlen=MOST_WAITING)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, after those that wait; stderr says when they begin to, and when they are written."""
        late = len(self.waiting)
        self.waiting.append(json.dumps(record) + "\n")
        try:
            _append_whole(self.path, "".join(self.waiting).encode())
        except OSError as error:
            if not late:
                notice(f"{self.path} can not be written ({error}): training goes on, its lines wait in memory")
            return
        self.waiting.clear()
        if late:
            notice(f"{self.path} can be written again, {late} lines came late")


def _append_whole(path: Path, lines: bytes) -> None:
    """All of them or none; where a killed process has left a line without its end, on a line of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            lines = b"\n" + lines
        try:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; half-written lines are passed over."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
