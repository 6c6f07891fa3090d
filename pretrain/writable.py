"""Whether a file can be written, asked before the work that fills it."""

import os
from pathlib import Path


def check_writable(*paths: Path | None) -> None:
    """Looks, without touching anything, whether each file that is named could be written.

    Raises:
        ValueError: a folder has its name, it is write-protected, or nothing can be made where it would lie.
    """
    for path in paths:
        if path is not None and (reason := _obstacle(path)):
            raise ValueError(f"{path} can not be written ({reason}): choose another place, or make room for it")


def _obstacle(path: Path) -> str | None:
    if path.is_dir():
        return "it is a folder"
    if os.path.lexists(path) and not os.access(path, os.W_OK):
        return "it is write-protected"
    place = path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder"
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} is write-protected"
