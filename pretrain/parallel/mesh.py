"""Process groups: which ranks share rows, parts of a row, matrices; a mesh of one process is a plain run."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from ..config import ParallelConfig

T = TypeVar("T")
RANK_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one another: rank 0 may tokenise a corpus or seal a checkpoint meanwhile."""
AXES = ("replicate", "shard", "context", "tensor")
"""Of the device mesh, the innermost last: its ranks talk most and should share a machine."""


@dataclass(frozen=True)
class Axis:
    """Ranks that share a piece of work."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in float64 and on the host, without waiting for the device."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return [float(v) for v in total.tolist()]

    def from_first(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank."""
        if self.size == 1:
            return decide()
        box = [decide() if self.rank == 0 else None]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier(group=self.group)


@dataclass(frozen=True)
class Mesh:
    """The processes of a run, and the axes along which they divide its work.

    Args:
        device: where this process computes.
        world: all processes, which decide together and write checkpoints together.
        data: processes with different rows of a batch.
        sums: processes whose losses add up to the batch's: those of `data`, and the parts of a row (context).
        tensor: processes that divide every matrix.
        context: processes that divide the positions of a row.
        devices: all of it as PyTorch sees it, with the axes of AXES; None in a process that is alone.
    """

    device: torch.device
    world: Axis = Axis()
    data: Axis = Axis()
    sums: Axis = Axis()
    tensor: Axis = Axis()
    context: Axis = Axis()
    devices: DeviceMesh | None = None


def single_process(device: torch.device | None = None) -> Mesh:
    """The mesh of a process that works alone; default: on the CPU."""
    return Mesh(device or torch.device("cpu"))


@contextmanager
def process_mesh(parallel: ParallelConfig | None = None, environ: Mapping[str, str] = os.environ) -> Iterator[Mesh]:
    """The mesh of torchrun's processes, from its variables; torn down at the end, with what an engine has set up.

    Raises:
        ValueError: the processes can not be divided as asked.
    """
    size = int(environ.get("WORLD_SIZE", 1))
    shape = mesh_shape(parallel or ParallelConfig(), size)
    device = _device(environ)
    if size == 1:
        with _without_new_groups():
            yield single_process(device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = _meeting_place(environ)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=RANK_TIMEOUT)
    try:
        yield build_mesh(device, shape)
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_new_groups() -> Iterator[None]:
    """Takes down the process group of one that some engines need even in a process that is alone."""
    before = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not before:
            dist.destroy_process_group()


def _meeting_place(environ: Mapping[str, str]) -> tuple[dist.Store, int, int]:
    """Where the processes find one another, and this one's rank among how many.

    torchrun keeps one store over its restarts, and in it the addresses of processes that are gone (PyTorch's
    #135712): on one machine every attempt gets names of its own, on several only torchrun can give it another store.
    """
    store, rank, size = next(rendezvous("env://", timeout=RANK_TIMEOUT))
    store.set_timeout(RANK_TIMEOUT)
    is_shared = (
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
    )
    if is_shared and environ.get("GROUP_WORLD_SIZE") != "1" and rank == 0:
        print(
            "penumbra: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts: on several machines its "
            "restarts may otherwise look for processes that are gone",
            file=sys.stderr,
            flush=True,
        )
    if is_shared and environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt-{environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, size


def build_mesh(device: torch.device, shape: tuple[int, int, int, int]) -> Mesh:
    """The mesh of an initialised process group, its sizes in the order of AXES."""
    warnings.filterwarnings("ignore", message="Slicing a flattened dim")  # as the axes of COMBINED are meant to be
    devices = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    flat = {name: devices[axes]._flatten(name) for name, axes in COMBINED.items()}
    return Mesh(
        device,
        world=Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD),
        data=_axis(flat["data"]),
        sums=_axis(flat["sums"]),
        tensor=_axis(devices["tensor"]),
        context=_axis(devices["context"]),
        devices=devices,
    )


COMBINED = {
    "data": ("replicate", "shard"),
    "sums": ("replicate", "shard", "context"),
    "weights": ("shard", "context"),
}
"""Axes of the device mesh that act as one: rows, sums of losses, and shards of the weights."""


def mesh_shape(parallel: ParallelConfig, size: int) -> tuple[int, int, int, int]:
    """Sizes of the axes AXES among `size` processes.

    Raises:
        ValueError: the other axes do not divide them.
    """
    others = parallel.replicate * parallel.context * parallel.tensor
    if size % others:
        raise ValueError(
            f"{size} processes do not divide into parallel.replicate={parallel.replicate} x "
            f"parallel.context={parallel.context} x parallel.tensor={parallel.tensor}: "
            f"use a multiple of {others} processes, or smaller axes"
        )
    return parallel.replicate, size // others, parallel.context, parallel.tensor


def _axis(mesh: DeviceMesh) -> Axis:
    return Axis(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def _device(environ: Mapping[str, str]) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, available = int(environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= available:
        raise ValueError(
            f"process {local} of this machine has no GPU, there are {available}: use --nproc-per-node={available}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
