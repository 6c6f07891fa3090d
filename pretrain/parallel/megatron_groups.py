"""Megatron-core's parallel state, made from the axes of a mesh."""

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from .mesh import RANK_TIMEOUT, Mesh


def start_groups(mesh: Mesh) -> tuple[ProcessGroup, ProcessGroup]:
    """The tensor group and the data group of this process; from now on Megatron's global state is theirs.

    Every process of the mesh calls it. A process has one such state at a time: layers keep their groups, but the
    cross-entropy looks its group up there, so an engine on another mesh takes it over. One that is alone gets a
    group of itself, because Megatron's functions ask their group even then.
    """
    assert mesh.context.size == 1, "Megatron's groups are tensor and data"
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not _divides_by(mesh.tensor.size):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=mesh.tensor.size,
            distributed_timeout_minutes=int(RANK_TIMEOUT.total_seconds() // 60),
            create_gloo_process_groups=False,
        )
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()


def _divides_by(size: int) -> bool:
    """Whether the state has tensor groups of that size among the processes of today; it outlives their groups."""
    group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    try:
        return group is not None and len(dist.get_process_group_ranks(group)) == size
    except KeyError:
        return False
