"""Saves beside the training: the loop waits for a copy in host memory, a thread writes and seals it."""

import copy
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from model.config import ModelConfig

from ..config import CheckpointConfig
from ..engines.base import Tensors
from ..notice import notice
from ..parallel.mesh import RANK_TIMEOUT, Axis, Mesh
from ..state import TrainState
from .agreement import on_every_rank, on_first_rank
from .manifest import Kind
from .save import NotSaved, save_checkpoint


@dataclass(frozen=True)
class _Flight:
    """A save that has begun."""

    outcome: "Future[Path]"
    state: TrainState


class Saver:
    """Writes the checkpoints of a run, one after the other; a context, at whose end none is in flight.

    Every rank makes one and calls its methods in the same order, except for `poll`, which asks no other rank.

    Args:
        folder: the run's checkpoints folder.
        save_tokenizer: writes the tokenizer's files into a folder.
        on_sealed: hears, in the loop's thread, of each sealed checkpoint and of the state that it holds.
        clock: in seconds; rank 0's tells when an ephemeral checkpoint is due.

    Raises:
        ValueError: nothing can be written to the folder, or not all ranks see the same one.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        model: ModelConfig,
        mesh: Mesh,
        *,
        save_tokenizer: Callable[[Path], None] | None,
        on_sealed: Callable[[Path, TrainState], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        obstacle = mesh.world.from_first(lambda: _obstacle(folder))
        if obstacle is not None:
            raise ValueError(f"no checkpoint can be written to {folder} ({obstacle}): choose another folder=...")
        if strangers := _strangers(folder, mesh.world):
            raise ValueError(
                f"{folder} is another folder for rank {strangers[0]} than for rank 0: choose one with folder=... that "
                "all machines share"
            )
        self.config, self.world, self.on_sealed, self.clock = config, mesh.world, on_sealed, clock
        self.axis = own_group(mesh.world) if config.asynchronous else mesh.world
        self.stager = _stager(mesh.device) if config.asynchronous else None
        self.executor: Executor = _thread(mesh.device) if config.asynchronous else _AtOnce()
        self.write = partial(
            save_checkpoint,
            folder,
            model=model,
            world=self.axis,
            save_tokenizer=save_tokenizer,
            keep=config.keep,
            keep_every=config.keep_every,
        )
        self.flight: _Flight | None = None
        self.lost: NotSaved | None = None
        self.last_began = clock()

    def save(self, tensors: Tensors, state: TrainState, kind: Kind = "permanent") -> None:
        """Begins a save, once the one in flight has ended; the tensors may change as soon as this returns."""
        self.wait()
        self.last_began = self.clock()
        state = copy.deepcopy(state)
        staged = tensors if self.stager is None else self.stager.stage(tensors)
        outcome = self.executor.submit(partial(self.write, staged, state, kind=kind))
        self.flight = _Flight(outcome, state)

    def ephemeral_due(self) -> bool:
        """Whether an ephemeral checkpoint should be saved now; rank 0 decides, none is begun behind another save."""
        if not self.config.ephemeral_minutes:
            return False
        return self.world.from_first(
            lambda: self.flight is None and self.clock() - self.last_began >= 60 * self.config.ephemeral_minutes
        )

    def poll(self) -> None:
        """Hears of a save that has ended; see `wait`."""
        if self.flight is not None and self.flight.outcome.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in flight; if the disk did not take it, stderr says so, and the next one tries again.

        Raises:
            Exception: what else went wrong in it.
        """
        if self._settle() and self.lost is not None and self.world.rank == 0:
            notice(f"{self.lost}: training goes on and the next save tries again")

    def finish(self) -> None:
        """Waits for the save in flight, the last one of all.

        Raises:
            ValueError: the disk did not take it.
            Exception: what else went wrong in it.
        """
        self._settle()
        if self.lost is not None:
            self.world.barrier()
            raise ValueError(
                f"{self.lost}: make room there and start the run again, it goes on from its newest checkpoint"
            )

    def _settle(self) -> bool:
        """Whether a save was in flight and has ended now."""
        if self.flight is None:
            return False
        flight, self.flight = self.flight, None
        try:
            path = flight.outcome.result()
        except NotSaved as error:
            self.lost = error
        else:
            self.lost = None
            self.on_sealed(path, flight.state)
        return True

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Lets a save in flight end, even where the training has failed meanwhile."""
        if self.flight is not None:
            self.flight.outcome.exception()
        self.executor.shutdown()
        if self.stager is not None:
            self.stager.close()
        if error is None and self.axis.group is not self.world.group:
            self.world.barrier()  # a rank that leaves early breaks the others' last collective
            dist.destroy_process_group(self.axis.group)


class _AtOnce(Executor):
    """Works in the thread that asks."""

    def submit(self, work, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future[object] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _obstacle(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return None if os.access(folder, os.W_OK | os.X_OK) else "it is write-protected"


def _strangers(folder: Path, world: Axis) -> list[int]:
    """Ranks that do not see what rank 0 writes into the folder; none where the disk is too full to ask."""
    sign = folder / f".rank-0-{world.from_first(lambda: secrets.token_hex(8))}"
    try:
        on_first_rank(world, sign.touch)
    except OSError:
        return []
    seen = on_every_rank(world, sign.exists)
    on_first_rank(world, sign.unlink)
    return [rank for rank, it_is in enumerate(seen) if not it_is]


def own_group(world: Axis) -> Axis:
    """The same ranks in a group of their own, whose collectives do not mix with the training's."""
    if world.size == 1:
        return world
    return replace(world, group=dist.new_group(backend="gloo", timeout=RANK_TIMEOUT))


def _stager(device: torch.device) -> DefaultStager:
    """Copies tensors to the host, into memory that it keeps: page-locked beside a GPU."""
    on_gpu = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
    )


def _thread(device: torch.device) -> ThreadPoolExecutor:
    """One thread; beside a GPU it looks at this process's own."""
    own = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=own)
