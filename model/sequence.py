"""The part of every row that one of several processes computes (context parallel).

A trunk takes its part of the positions on the way in and gathers the others' on the way out, so that everything around
it sees whole rows: pooling over a row needs no second thought, and only losses are divided once more, by masked row.
Inside, queries are the part's own, keys and values are gathered.

Shapes: B sequences, L positions of a whole row, P positions of a part; "..." any.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class SequencePart:
    """A contiguous part of the positions.

    Args:
        group: the processes that share the rows.
        rank: which of the parts this process computes.
        size: how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def span(self, length: int) -> slice:
        """Where the part lies among `length` positions (or segments, or rows).

        Raises:
            ValueError: they do not divide.
        """
        if length % self.size:
            raise ValueError(
                f"{length} positions or blocks do not divide among {self.size} context-parallel processes: "
                "change parallel.context, data.length or model.block_size"
            )
        width = length // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def take(self, x: Tensor) -> Tensor:
        """[B, L, ...] to [B, P, ...]; what is one for all positions [B, 1, ...] stays."""
        return x if x.shape[1] == 1 else x[:, self.span(x.shape[1])]

    def gather(self, x: Tensor) -> Tensor:
        """[B, P, ...] of every process to [B, L, ...]; gradients that the processes have for a part add up."""
        gathered: Tensor = _Gather.apply(x, self)
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: SequencePart) -> Tensor:
        ctx.part = part
        moved = x.transpose(0, 1).contiguous()
        whole = moved.new_empty(part.size * moved.shape[0], *moved.shape[1:])
        dist.all_gather_into_tensor(whole, moved, group=part.group)
        return whole.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.transpose(0, 1).contiguous()
        own = whole.new_empty(whole.shape[0] // ctx.part.size, *whole.shape[1:])
        dist.reduce_scatter_tensor(own, whole, group=ctx.part.group)
        return own.transpose(0, 1), None
