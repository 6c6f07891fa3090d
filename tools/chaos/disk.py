"""A small disk of its own under a folder, to be filled and freed."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIZE = "16m"
BALLAST = "ballast"


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A tmpfs at a place; what was on it lies there afterwards.

    Raises:
        ValueError: it can not be mounted.
    """
    place.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ValueError(
            f"full-disk needs a small tmpfs, which can not be mounted at {place} ({said}): "
            "run it as root, or leave full-disk out of --kinds"
        ) from None
    kept = place.with_name(f"{place.name}.kept")
    try:
        yield
    finally:
        shutil.copytree(place, kept)
        _run("umount", str(place))
        place.rmdir()
        kept.rename(place)


def release(place: Path) -> None:
    """Takes away the disk that a killed chaos has left at a place."""
    if place.is_mount():
        _run("umount", str(place))


def fill(place: Path, room: int) -> None:
    """Leaves so many bytes free."""
    disk = os.statvfs(place)
    with suppress(OSError):  # the run may be faster: then nothing is free
        (place / BALLAST).write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))


def free(place: Path) -> None:
    """Takes the ballast away."""
    (place / BALLAST).unlink()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
