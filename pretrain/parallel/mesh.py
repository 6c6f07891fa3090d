"""Process groups: one data axis; a mesh of one process is a plain run."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
RANK_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one another: rank 0 may tokenise a corpus or seal a checkpoint meanwhile."""


@dataclass(frozen=True)
class DataAxis:
    """The ranks among which a batch is divided: all that data and metrics know of the mesh."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of the axis."""
        return None if self.mesh is None else self.mesh.get_group("data")

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


def single_process() -> DataAxis:
    """The axis of a process that works alone, on the CPU."""
    return DataAxis(rank=0, size=1, device=torch.device("cpu"))


@contextmanager
def process_mesh(environ: Mapping[str, str] = os.environ) -> Iterator[DataAxis]:
    """The data axis of this process, from torchrun's variables; torn down at the end."""
    size, rank = int(environ.get("WORLD_SIZE", 1)), int(environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, available = int(environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= available:
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {available}: use --nproc-per-node={available}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size == 1:
        yield DataAxis(rank=0, size=1, device=device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("data",))
        yield DataAxis(rank=rank, size=size, device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()
