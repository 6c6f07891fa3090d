"""Atomic saves: step-N.tmp, every file through to the disk, a manifest as seal, one rename, old ones removed."""

import json
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from model.config import ModelConfig

from ..engines.base import Tensors
from ..parallel.mesh import Axis
from ..state import TrainState
from .manifest import FORMAT, FileSeal, Manifest, sha256_of, sync_folder, write_synced


def checkpoint_name(step: int) -> str:
    """Folder of a step, sorted by name as by number."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    tensors: Tensors,
    state: TrainState,
    model: ModelConfig,
    world: Axis,
    *,
    save_tokenizer: Callable[[Path], None] | None,
    keep: int,
) -> Path:
    """Writes one sealed checkpoint and removes all but the newest `keep`; every rank calls it.

    Args:
        folder: the run's checkpoints folder.
        save_tokenizer: writes the tokenizer's files into a folder.

    Raises:
        ValueError: the folder can not be written.
    """
    final = folder / checkpoint_name(state.step)
    partial = final.with_suffix(".tmp")
    if world.rank == 0:
        _start(partial)
    world.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=partial / "tensors", no_dist=world.size == 1)
    if world.rank == 0:
        write_synced(partial / "model.json", json.dumps(asdict(model), indent=1))
        write_synced(partial / "state.json", json.dumps(state.as_dict(), indent=1))
        if save_tokenizer is not None:
            save_tokenizer(partial / "tokenizer")
        _seal(partial, final, state.step, world.size)
        _retain(final, keep)
    world.barrier()
    return final


def _start(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"no checkpoint can be written to {partial.parent} ({error}): choose another folder=..."
        ) from None


def _seal(partial: Path, final: Path, step: int, world_size: int) -> None:
    files = {
        str(path.relative_to(partial)): FileSeal(path.stat().st_size, sha256_of(path))
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    Manifest(FORMAT, step, files, versions, world_size).write(partial)
    for nested in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync_folder(nested)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)


def _retain(newest: Path, keep: int) -> None:
    """Keeps the newest `keep`; removes the rest, leftovers, and later ones, which the resume has found damaged."""
    found = sorted(newest.parent.glob("step-*"))
    sealed = [path for path in found if path.suffix != ".tmp" and path <= newest]
    for path in set(found) - set(sealed[-keep:]):
        shutil.rmtree(path, ignore_errors=True)
