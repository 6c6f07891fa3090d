"""The seal of a checkpoint: what it holds, file by file, and for which model."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

FORMAT = 1
MANIFEST = "manifest.json"
Kind = Literal["permanent", "ephemeral"]
"""Ephemeral ones shorten what a crash costs, and go when a newer checkpoint is sealed."""


def sealed_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder that bear their final names, oldest first, unopened."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")


@dataclass(frozen=True)
class FileSeal:
    """Bytes and hexadecimal sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Written last, inside the folder, before the folder gets its final name.

    Args:
        format: version of the layout.
        step: optimizer steps finished.
        files: by relative path.
        versions: of python and torch.
        world_size: ranks that wrote it.
        kind: permanent, also where a manifest does not say so, or ephemeral.
    """

    format: int
    step: int
    files: dict[str, FileSeal]
    versions: dict[str, str]
    world_size: int
    kind: Kind = "permanent"

    def write(self, folder: Path) -> None:
        """Writes and fsyncs the manifest."""
        write_synced(folder / MANIFEST, json.dumps(asdict(self), indent=1))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a sealed checkpoint.

    Raises:
        ValueError: there is none, or it can not be read.
    """
    try:
        manifest = TypeAdapter(Manifest).validate_json((folder / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} is not a sealed checkpoint ({reason}): pass a run folder or one of its step-N folders"
        ) from None
    if manifest.format != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {manifest.format}, this code reads {FORMAT}: use the code that wrote it"
        )
    return manifest


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Writes a small file through to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
