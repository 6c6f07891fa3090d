"""Initial weights of sharded parameters: every process draws its part of the same whole."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, empty

from model.initialisation import initialise

WORLD, ROWS, COLUMNS = 4, 7, 10
CASES: tuple[tuple[tuple[int, ...], tuple[Placement, ...]], ...] = (
    ((4,), (Shard(0),)),
    ((4,), (Shard(1),)),
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Shard(1), Shard(0))),
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 2), (Replicate(), Shard(0))),
)


def run_rank(rank: int, rendezvous: str) -> None:
    """Compares this process's part with its cut of the unsharded weight, for every mesh."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    whole = nn.Linear(COLUMNS, ROWS, bias=False)
    initialise(whole, 0, num_layers=1)
    for mesh_shape, placements in CASES:
        mesh = init_device_mesh("cpu", mesh_shape)
        weight = empty(ROWS, COLUMNS, device_mesh=mesh, placements=placements)
        part = nn.Linear(COLUMNS, ROWS, bias=False)
        part.weight = nn.Parameter(weight)
        initialise(part, 0, num_layers=1)
        expected = whole.weight.detach()
        for axis, placement in enumerate(placements):
            if isinstance(placement, Shard):
                expected = expected.chunk(mesh_shape[axis], placement.dim)[mesh.get_local_rank(axis)]
        found = part.weight.data
        assert isinstance(found, DTensor)
        assert torch.equal(found.to_local(), expected), f"{mesh_shape}, {placements}, rank {rank}"
    dist.destroy_process_group()


def test_every_shard_is_its_part_of_the_whole(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
