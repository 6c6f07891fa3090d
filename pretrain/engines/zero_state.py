"""Flat partitions by the canonical names of a checkpoint, one parameter at a time.

Named tensors lie in host memory: beside a GPU that is full of weights and optimizer state there is no room for a second
copy. On the device a process needs one parameter's part of its own; only what another process keeps of it moves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..parallel.mesh import Axis, Mesh
from .zero import Fragment

Span = tuple[int, int]
"""Where a part of a flattened parameter begins and ends."""


@dataclass(frozen=True)
class Shares:
    """How many elements of a parameter this process has in common with every process, in the order of ranks.

    Args:
        given: of its fragment, what is in the rows of each.
        taken: of its rows, what is in the fragment of each.
    """

    given: list[int]
    taken: list[int]


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
        held = [_span(fragment) for fragment in fragments.values()]
        kept = [self._rows(name) for name in fragments]
        self.shares = dict(zip(fragments, _shares(mesh.data, held, kept), strict=True))

    def blank(self, name: str) -> Tensor:
        """A named tensor of zeros on the device: this process's rows of it, or all of it in a process that is alone."""
        if self.devices is None:
            return torch.zeros(self.shapes[name], device=self.mesh.device)
        return zeros(self.shapes[name], device_mesh=self.devices, placements=[Shard(0)])

    def read(self, flats: Sequence[Tensor], name: str) -> Tensor:
        """The named tensor of a parameter, in host memory."""
        fragment, shares = self.fragments[name], self.shares[name]
        mine = flats[0][:0] if fragment is None else fragment.of(flats)
        named = self.blank(name).cpu()
        _flat(named).copy_(self._exchange(mine, shares.given, shares.taken))
        return named

    def write(self, flats: Sequence[Tensor], name: str, named: Tensor) -> None:
        """Puts a named tensor, which may lie anywhere, where it belongs."""
        fragment, shares = self.fragments[name], self.shares[name]
        found = self._exchange(_flat(named), shares.taken, shares.given)
        if fragment is not None:
            fragment.of(flats).copy_(found)

    def _exchange(self, mine: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """Gives every process its share of a flat tensor, one after the other; what this one takes from each."""
        if self.mesh.data.size == 1:
            return mine
        found = torch.empty(sum(taken), device=self.mesh.device)
        dist.all_to_all_single(found, mine.to(self.mesh.device), taken, given, group=self.mesh.data.group)
        return found

    def _rows(self, name: str) -> Span:
        """This process's rows of a named tensor."""
        shape = self.shapes[name]
        if self.devices is None:
            return 0, shape.numel()
        local, offset = compute_local_shape_and_global_offset(shape, self.devices, [Shard(0)])
        width = shape[1:].numel()
        return offset[0] * width, (offset[0] + local[0]) * width


def whole_of(named: Tensor) -> Tensor:
    """All rows of a named tensor, on every process."""
    return named.full_tensor() if isinstance(named, DTensor) else named


def _flat(named: Tensor) -> Tensor:
    """What this process has of a named tensor, on the same memory."""
    return (named.to_local() if isinstance(named, DTensor) else named).view(-1)


def _span(fragment: Fragment | None) -> Span:
    return (0, 0) if fragment is None else (fragment.start, fragment.start + fragment.numel)


def _shares(axis: Axis, held: Sequence[Span], kept: Sequence[Span]) -> list[Shares]:
    """Shares of every parameter, of which a process has one part of the flat partitions and one by rows.

    Both kinds of parts follow one another in the order of ranks.
    """
    place = torch.zeros(axis.size, 2, len(held), 2, dtype=torch.float64)
    place[axis.rank] = torch.tensor([held, kept], dtype=torch.float64).view(2, len(held), 2)
    spans = torch.tensor(axis.all_reduce(place.flatten().tolist())).long().view(place.shape).tolist()
    shares = []
    for number, (fragment, rows) in enumerate(zip(held, kept, strict=True)):
        given = [_overlap(fragment, theirs[1][number]) for theirs in spans]
        taken = [_overlap(rows, theirs[0][number]) for theirs in spans]
        assert sum(given) == fragment[1] - fragment[0]
        assert sum(taken) == rows[1] - rows[0]
        shares.append(Shares(given, taken))
    return shares


def _overlap(one: Span, other: Span) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
