"""Batches, step by step: each rank's slice of the global batch, prepared ahead by worker processes."""

import os
import signal
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.packing import Rows, Source

T = TypeVar("T")
Int64Array = npt.NDArray[np.int64]


class Loader(Generic[T]):
    """The batches of steps first_step..num_steps-1 of one rank, a pure function of the step.

    Step s covers the global sample positions s * global_batch ... (s + 1) * global_batch - 1, of which rank r
    of `size` takes its contiguous share, so world size and resume change nothing about what a step sees.
    order: global sample positions -> indices of the source. transform: called with (step, rows), where rows
    is Source.gather's dict plus "index" [b] int64, the global sample positions; its result is what iteration
    yields.
    first_step, num_steps: the first step and one past the last.
    pin_memory: puts what `transform` returns into page-locked memory by its own pin_memory(), for a GPU to copy.
    num_workers: processes that run gather and transform ahead of the loop, 0 for none; where the platform
    does not fork, source, order and transform must pickle.
    Raises ValueError when global_batch does not divide by size.
    """

    def __init__(
        self,
        source: Source,
        order: Callable[[Int64Array], Int64Array],
        *,
        global_batch: int,
        rank: int,
        size: int,
        first_step: int,
        num_steps: int,
        num_workers: int,
        transform: Callable[[int, Rows], T],
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < size, f"rank {rank} of {size}"
        _check_batch(global_batch, size)
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; give 0 (no worker processes) or more")
        self._batches = _Batches(source, order, global_batch, rank, size, transform)
        self._steps = range(first_step, num_steps)
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Generator[T, None, None]:
        """The batches; close them early, and the worker processes end."""
        if not self._num_workers:
            yield from map(self._batches.__getitem__, self._steps)
            return
        batches = iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=self._steps,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # else starting the workers advances the global generator
            )
        )
        try:
            yield from batches
        finally:
            # Not left to the garbage collector: an error may hold on to them until the interpreter ends, which waits
            # for them after a SIGTERM that they pass over.
            batches._shutdown_workers()  # type: ignore[attr-defined]


class _Batches(Dataset[T]):
    """The batch of a step, indexed by the step."""

    def __init__(
        self,
        source: Source,
        order: Callable[[Int64Array], Int64Array],
        global_batch: int,
        rank: int,
        size: int,
        transform: Callable[[int, Rows], T],
    ) -> None:
        self._source, self._order, self._transform = source, order, transform
        self._global_batch, self._share, self._rank = global_batch, global_batch // size, rank

    def __getitem__(self, step: int) -> T:
        first = step * self._global_batch + self._rank * self._share
        positions = np.arange(first, first + self._share, dtype=np.int64)
        rows = self._source.gather(self._order(positions))
        return self._transform(step, rows | {"index": torch.from_numpy(positions)})


def _check_batch(global_batch: int, size: int) -> None:
    if global_batch < 1:
        raise ValueError(f"the global batch is {global_batch} sequences; give at least 1")
    if global_batch % size:
        legal = [str(count) for count in range(1, global_batch + 1) if global_batch % count == 0]
        raise ValueError(
            f"a global batch of {global_batch} sequences does not divide over {size} data-parallel ranks; "
            f"use a world size of {', '.join(legal)}, or a batch that is a multiple of {size}"
        )


def _start_worker(worker: int) -> None:
    """One thread, and hard of hearing: what asks all processes of a run to stop is for its loop to answer."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _Patience())


class _Patience:
    """Passes over the first SIGTERM and its echoes; one that comes later is meant for the worker and ends it."""

    echo = 2.0

    def __init__(self) -> None:
        self.first = float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.first = min(self.first, now)
        if now > self.first + self.echo:
            os._exit(0)
