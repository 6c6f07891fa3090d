"""Flat partitions by the canonical names of a checkpoint, one parameter at a time.

No process ever holds more than one parameter whole in float32, besides its own shards of all of them.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..parallel.mesh import Mesh
from .zero import Fragment


class NamedState:
    """Reads and writes parameters in flat partitions.

    Args:
        mesh: its data axis divides both the flat partitions and, by rows, the named tensors.
        shapes: of the whole parameters, by name.
        fragments: what this process holds of each trained one.
    """

    def __init__(self, mesh: Mesh, shapes: Mapping[str, torch.Size], fragments: Mapping[str, Fragment | None]) -> None:
        self.mesh, self.shapes, self.fragments = mesh, shapes, fragments
        self.devices = None if mesh.devices is None else mesh.devices["weights"]

    def blank(self, name: str) -> Tensor:
        """A named tensor of zeros in float32: this process's rows of it, or all of it in a process that is alone."""
        if self.devices is None:
            return torch.zeros(self.shapes[name], device=self.mesh.device)
        return zeros(self.shapes[name], device_mesh=self.devices, placements=[Shard(0)])

    def read(self, flats: Sequence[Tensor], name: str) -> Tensor:
        """The named tensor of a parameter."""
        whole = torch.zeros(self.shapes[name].numel(), device=self.mesh.device)
        fragment = self.fragments[name]
        if fragment is not None:
            whole.narrow(0, fragment.start, fragment.numel).copy_(fragment.of(flats))
        if self.mesh.data.size > 1:
            dist.all_reduce(whole, group=self.mesh.data.group)
        named = self.blank(name)
        _rows(named).copy_(_part(whole.view(self.shapes[name]), named))
        return named

    def write(self, flats: Sequence[Tensor], name: str, named: Tensor) -> None:
        """Puts a named tensor where it belongs."""
        whole = whole_of(named).flatten()
        fragment = self.fragments[name]
        if fragment is not None:
            fragment.of(flats).copy_(whole.narrow(0, fragment.start, fragment.numel))


def whole_of(named: Tensor) -> Tensor:
    """All rows of a named tensor, on every process."""
    return named.full_tensor() if isinstance(named, DTensor) else named


def _rows(named: Tensor) -> Tensor:
    return named.to_local() if isinstance(named, DTensor) else named


def _part(whole: Tensor, named: Tensor) -> Tensor:
    """Of a whole parameter, the rows that this process keeps."""
    if not isinstance(named, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(named.shape, named.device_mesh, named.placements)
    return whole.narrow(0, offset[0], shape[0])
