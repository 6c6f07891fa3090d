"""Checking a checkpoint against its seal, the files divided among the ranks."""

from collections.abc import Iterable
from pathlib import Path

from ..parallel.mesh import Axis
from .agreement import on_every_rank
from .manifest import FileSeal, Manifest, read_manifest, sha256_of

ALONE = Axis()


def damage(folder: Path, world: Axis = ALONE) -> str | None:
    """What differs from the manifest (a file missing, its size or its hash), or None; every rank hears the same."""
    manifest = world.from_first(lambda: _manifest_or_fault(folder))
    if isinstance(manifest, str):
        return manifest
    share = share_of(manifest, world)
    faults = on_every_rank(world, lambda: _first_fault(folder, share))
    return next((fault for fault in faults if fault is not None), None)


def share_of(manifest: Manifest, world: Axis) -> list[tuple[str, FileSeal]]:
    """The files that a rank checks: dealt out from the largest to the smallest."""
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    return by_size[world.rank :: world.size]


def _manifest_or_fault(folder: Path) -> Manifest | str:
    try:
        return read_manifest(folder)
    except ValueError as error:
        return str(error)


def _first_fault(folder: Path, files: Iterable[tuple[str, FileSeal]]) -> str | None:
    for name, expected in files:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                return f"{path} has {size} bytes instead of {expected.size}"
            if sha256_of(path) != expected.sha256:
                return f"{path} does not have its sha256"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} can not be read ({error.strerror})"
    return None
