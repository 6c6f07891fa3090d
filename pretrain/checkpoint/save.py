"""Atomic saves: step-N.tmp, every file through to the disk, a manifest as seal, one rename, old ones removed."""

import errno
import json
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from model.config import ModelConfig

from ..engines.base import Tensors
from ..parallel.mesh import Axis
from ..state import TrainState
from .agreement import on_every_rank, on_first_rank
from .manifest import FORMAT, FileSeal, Kind, Manifest, sha256_of, sync_folder, write_synced
from .retention import retain

TENSORS = "tensors"
Seals = dict[str, FileSeal]


class NotSaved(Exception):
    """A checkpoint that the disk did not take: it was full, write-protected or broken. Nothing of it is left."""


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
    keep_every: int = 0,
    kind: Kind = "permanent",
) -> Path:
    """Writes one sealed checkpoint and removes those that it makes superfluous; every rank calls it.

    Each rank writes, syncs and hashes the tensors that it holds; rank 0 adds what is small, and the seal.

    Args:
        folder: the run's checkpoints folder.
        save_tokenizer: writes the tokenizer's files into a folder.
        keep, keep_every: see `retain`.

    Raises:
        NotSaved: the disk did not take it, on one rank at least; said on all of them.
    """
    final = folder / checkpoint_name(state.step)
    partial = final.with_suffix(".tmp")

    def seal(tensors: Seals) -> None:
        _refuse_unseen(partial, tensors)
        _write_small_files(partial, state, model, save_tokenizer)
        files = tensors | _seals(partial, (p for p in partial.rglob("*") if _name(partial, p) not in tensors))
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        Manifest(FORMAT, state.step, dict(sorted(files.items())), versions, world.size, kind).write(partial)
        _publish(partial, final)
        retain(final, keep=keep, keep_every=keep_every)

    try:
        on_first_rank(world, lambda: _start(partial))
        seals = _write_tensors(partial, tensors, world)
        on_first_rank(world, lambda: seal(seals))
    except (Exception, CheckpointException) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        on_first_rank(world, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise NotSaved(f"the checkpoint of step {state.step} can not be written to {folder} ({refusal})") from error
    return final


def _start(partial: Path) -> None:
    """An empty folder, and no other half-written one beside it."""
    for leftover in partial.parent.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(partial: Path, tensors: Tensors, world: Axis) -> Seals:
    """Every rank's shards, on disk; seals of all their files, each made by the rank that wrote it."""
    alone = world.size == 1
    if alone:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `alone` asks for
    writer = _Writer(partial / TENSORS)
    dcp.save(tensors, storage_writer=writer, process_group=world.group, no_dist=alone)
    mine = (partial / TENSORS).glob(f"__{world.rank}_*")
    told = on_every_rank(world, lambda: _seals(partial, mine))
    return {name: seal for seals in told for name, seal in seals.items()}


class _Writer(dcp.FileSystemWriter):
    """Passes on what the operating system says; torch.save hides it behind errors of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, cause.filename) from error


def _write_small_files(
    partial: Path, state: TrainState, model: ModelConfig, save_tokenizer: Callable[[Path], None] | None
) -> None:
    write_synced(partial / "model.json", json.dumps(asdict(model), indent=1))
    write_synced(partial / "state.json", json.dumps(state.as_dict(), indent=1))
    if save_tokenizer is not None:
        save_tokenizer(partial / "tokenizer")


def _seals(partial: Path, paths: Iterable[Path]) -> Seals:
    """Sizes and hashes of those that are files, by their names within the checkpoint."""
    files = (path for path in paths if path.is_file())
    return {_name(partial, path): FileSeal(path.stat().st_size, sha256_of(path)) for path in files}


def _refuse_unseen(partial: Path, seals: Seals) -> None:
    """Raises OSError for a file of another rank that is not here, or not whole."""
    for name, seal in seals.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != seal.size:
            raise OSError(errno.ENOENT, "rank 0 does not see what another rank wrote: is the folder shared?", str(path))


def _name(partial: Path, path: Path) -> str:
    return str(path.relative_to(partial))


def _publish(partial: Path, final: Path) -> None:
    """Makes the names durable and gives the folder its own, in place of a damaged one that may have it."""
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync_folder(folder)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)


def _refusal(error: BaseException) -> str | None:
    """What the disk said, where nothing else went wrong on any rank."""
    errors = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    causes = [_os_error(e) for e in errors]
    return None if None in causes else str(causes[0])


def _os_error(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system that an error comes from."""
    while isinstance(error, Exception):
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
