"""The one form in which measurements are written: what was run, on what, and the numbers by dotted key."""

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import write_synced
from pretrain.commit import commit
from pretrain.train import environment


@dataclass
class Record:
    """A measurement under way; `write` ends it.

    Args:
        settings: everything that the numbers depend on; what a ratio is a ratio to.
        command: the command line.
    """

    settings: Mapping[str, Any]
    command: str = field(default_factory=lambda: " ".join(["penumbra", *sys.argv[1:]]))
    started: float = field(default_factory=time.monotonic)

    def as_dict(self, results: Mapping[str, float]) -> dict[str, Any]:
        """The record with its results."""
        return {
            "command": self.command,
            "commit": commit(),
            **environment(),
            "settings": dict(self.settings),
            "seconds": round(time.monotonic() - self.started, 3),
            "results": dict(results),
        }

    def write(self, results: Mapping[str, float], *paths: Path | None) -> None:
        """Writes the record to each path that is given, whole or not at all."""
        text = json.dumps(self.as_dict(results), indent=1)
        for path in paths:
            if path is not None:
                write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        ValueError: the place can not be written.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(partial, text)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ValueError(f"{path} can not be written ({error}): choose another place") from None
