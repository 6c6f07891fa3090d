"""Which checkpoints stay once a newer one is sealed."""

import shutil
from pathlib import Path

from .manifest import Manifest, read_manifest, sealed_in


def retain(newest: Path, *, keep: int, keep_every: int) -> None:
    """Removes what a newly sealed checkpoint makes superfluous.

    There stay: the new one; of the permanent ones up to it the newest `keep`; and whatever has a step that
    `keep_every` (if not 0) divides. Earlier ephemeral ones go. One whose seal can not be read counts as permanent.
    Later ones, which the resume has passed over as damaged, wait until the run gets there.
    """
    manifests = {path: _manifest(path) for path in sealed_in(newest.parent) if path <= newest}
    permanent = [p for p, manifest in manifests.items() if _is_permanent(manifest)]
    marked = [p for p, manifest in manifests.items() if manifest and keep_every and manifest.step % keep_every == 0]
    for path in set(manifests) - {newest, *permanent[-keep:], *marked}:
        shutil.rmtree(path, ignore_errors=True)


def abandon_after(checkpoint: Path) -> None:
    """Removes later checkpoints, for a run that goes another way from this one."""
    for path in sealed_in(checkpoint.parent):
        if path > checkpoint:
            shutil.rmtree(path, ignore_errors=True)


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except ValueError:
        return None


def _is_permanent(manifest: Manifest | None) -> bool:
    return manifest is None or manifest.kind == "permanent"
