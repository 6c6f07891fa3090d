"""Which checkpoints stay once a newer one is sealed."""

import shutil
from pathlib import Path

from .manifest import Manifest, read_manifest


def retain(newest: Path, *, keep: int, keep_every: int) -> None:
    """Removes what a newly sealed checkpoint makes superfluous.

    There stay: the new one; of the permanent ones up to it the newest `keep`; and whatever has a step that
    `keep_every` (if not 0) divides. Earlier ephemeral ones go, and so do later ones, which the resume has found
    damaged. One whose seal can not be read counts as permanent.
    """
    sealed = sorted(path for path in newest.parent.glob("step-*") if path.suffix != ".tmp")
    manifests = {path: _manifest(path) for path in sealed}
    permanent = [p for p, manifest in manifests.items() if p <= newest and _is_permanent(manifest)]
    marked = [p for p, manifest in manifests.items() if manifest and keep_every and manifest.step % keep_every == 0]
    for path in set(sealed) - {newest, *permanent[-keep:], *marked}:
        shutil.rmtree(path, ignore_errors=True)


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except ValueError:
        return None


def _is_permanent(manifest: Manifest | None) -> bool:
    return manifest is None or manifest.kind == "permanent"
