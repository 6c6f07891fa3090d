"""Files of one JSON object a line, which a kill may cut off anywhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def end_half_line(path: Path) -> None:
    """A killed process may have left a line without its end: what is appended then starts a line of its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


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
