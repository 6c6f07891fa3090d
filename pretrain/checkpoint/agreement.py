"""Work that all ranks do together: what fails on one of them has failed on every one."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..parallel.mesh import Axis

T = TypeVar("T")


def on_every_rank(world: Axis, work: Callable[[], T]) -> list[T]:
    """What the work gives on each rank, in their order, told to all of them.

    Raises:
        OSError, RuntimeError: the first failure in the order of the ranks, raised on all of them.
    """
    if world.size == 1:
        return [work()]
    value, failure = None, None
    try:
        value = work()
    except Exception as error:
        failure = _portable(error, world.rank)
    told: list[tuple[T, Exception | None]] = [None] * world.size  # type: ignore[list-item]
    dist.all_gather_object(told, (value, failure), group=world.group)
    for _, failure in told:
        if failure is not None:
            raise failure
    return [value for value, _ in told]


def on_first_rank(world: Axis, work: Callable[[], object]) -> None:
    """Lets rank 0 work, while the others wait to hear how it went.

    Raises:
        OSError, RuntimeError: it failed.
    """

    def first() -> None:
        if world.rank == 0:
            work()

    on_every_rank(world, first)


def _portable(error: Exception, rank: int) -> Exception:
    """An exception that any process can unpickle."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
