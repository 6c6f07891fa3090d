"""Rows whose positions several processes divide among them, as a trunk's own business.

A trunk takes its part of the positions on the way in and gathers the others' on the way out, so that everything around
it sees whole rows, and the choice of rows for the head needs no second thought. Only latents do without: what each
process pools of its part is added up.

Context parallel: all of a trunk's work is divided, and so are the losses, once more, by masked row. Inside, queries are
the part's own, keys and values are gathered. Sequence parallel, where processes divide the matrices of a trunk (tensor
parallel): what lies between the products is divided, and losses are not. Both at once: parts are divided again.

Shapes: B sequences, L positions of a whole row, P positions of a part, S segments; "..." any.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Span:
    """One of several contiguous parts of the positions, all of one length.

    Args:
        rank: which of them.
        size: how many there are.
    """

    rank: int
    size: int

    def span(self, length: int) -> slice:
        """Where the part lies among `length` positions (or segments, or rows).

        Raises:
            ValueError: they do not divide.
        """
        if length % self.size:
            raise ValueError(
                f"{length} positions or blocks do not divide among {self.size} processes: "
                "change data.length, model.block_size, parallel.context or parallel.tensor"
            )
        width = length // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def take(self, x: Tensor) -> Tensor:
        """[B, L, ...] to [B, P, ...]; what is one for all positions [B, 1, ...] stays."""
        return x if x.shape[1] == 1 else x[:, self.span(x.shape[1])]


@dataclass(frozen=True)
class SequencePart(Span):
    """A part of a row that one of several processes computes, to the loss (context parallel)."""

    group: dist.ProcessGroup

    def gather(self, x: Tensor) -> Tensor:
        """[B, P, ...] of every process to [B, L, ...]; gradients that the processes have for a part add up."""
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, without a gradient."""
        return _sum(x, self.group)

    def pool(self, weight_BSR: Tensor, x_BPD: Tensor) -> Tensor:
        """Weighted sums of the segments of a row, of R positions each [B, S, D], from the part of every process.

        Positions behind the segments, which are a second stream, do not count.
        """
        num_segments, length = weight_BSR.shape[1:]
        span = self.span(self.size * x_BPD.shape[1])
        first, last = span.start // length, math.ceil(span.stop / length)
        x_BSRD = F.pad(x_BPD, (0, 0, span.start - first * length, last * length - span.stop)).unflatten(1, (-1, length))
        behind = max(0, last - num_segments)
        own_BSD = torch.einsum("bsr,bsrd->bsd", F.pad(weight_BSR, (0, 0, 0, behind))[:, first:last], x_BSRD)
        own_BSD = F.pad(own_BSD.float(), (0, 0, first, max(0, num_segments - last)))
        summed: Tensor = _AddUp.apply(own_BSD[:, :num_segments], self)
        return summed.to(x_BPD.dtype)


@dataclass(frozen=True)
class SequenceShard(Span):
    """A part of a row between the products of a trunk whose matrices the processes divide (sequence parallel).

    Before and after the trunk all of them compute the same, gradients included.
    """

    group: dist.ProcessGroup

    def split(self, x: Tensor) -> Tensor:
        """[B, L, ...] to [B, P, ...]; the gradient is put together from all parts."""
        part: Tensor = _Split.apply(x, self)
        return part

    def split_segments(self, x: Tensor) -> Tensor:
        """[B, S, ...] to that of the segments of the part, each repeated where parts divide it."""
        return self.split(x.repeat_interleave(self.size // math.gcd(x.shape[1], self.size), dim=1))

    def join(self, x: Tensor) -> Tensor:
        """[B, P, ...] of every process to [B, L, ...]."""
        whole: Tensor = _Join.apply(x, self)
        return whole


def _all_parts(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """[B, P, ...] of every process to [B, L, ...]."""
    moved = x.transpose(0, 1).contiguous()
    whole = moved.new_empty(size * moved.shape[0], *moved.shape[1:])
    dist.all_gather_single(whole, moved, group=group)
    return whole.transpose(0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: SequencePart) -> Tensor:
        ctx.part = part
        return _all_parts(x, part.size, part.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.transpose(0, 1).contiguous()
        own = whole.new_empty(whole.shape[0] // ctx.part.size, *whole.shape[1:])
        dist.reduce_scatter_single(own, whole, group=ctx.part.group)
        return own.transpose(0, 1), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: SequencePart) -> Tensor:
        ctx.part = part
        return _sum(x, part.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.part.group), None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return x[:, shard.span(x.shape[1])].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_parts(gradient, ctx.shard.size, ctx.shard.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return _all_parts(x, shard.size, shard.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.shard.span(gradient.shape[1])].contiguous(), None
