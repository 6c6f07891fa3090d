"""Sums of gradients over processes that hold the same weights, under way while the backward pass goes on."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 24 * 2**20


class GradientSum:
    """Adds gradients up a bucket at a time, in an order that is the same on every process.

    Args:
        parameters: plain ones, in the order of the model; their gradients come in about the reverse.
        group: the processes.
        bucket_bytes: most that a message of several gradients carries.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        self.group = group
        self.buckets = list(_buckets(reversed(trained), bucket_bytes))
        self.bucket_of = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[int] = []
        self.sent: list[_Message] = []
        self.open = False
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def expect(self, *, last: bool) -> None:
        """Before a backward pass: whether gradients are complete after it."""
        self.open, self.missing, self.sent = last, [len(bucket) for bucket in self.buckets], []

    def finish(self) -> None:
        """After the last backward pass: waits for the sums, which are now the gradients."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for message in self.sent:
            message.receive()
        self.open, self.sent = False, []

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self.open:
            return
        self.missing[self.bucket_of[parameter]] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        self.sent.append(_Message([p.grad for p in bucket if p.grad is not None], self.group))


def add_up(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums gradients over processes in one message."""
    _Message(gradients, group).receive()


class _Message:
    """Gradients on their way: a large one as it lies in memory, small ones in a copy."""

    def __init__(self, gradients: list[Tensor], group: dist.ProcessGroup) -> None:
        self.gradients = gradients
        self.in_place = len(gradients) == 1 and gradients[0].is_contiguous()
        self.work: dist.Work | None = None
        if gradients:
            self.flat = gradients[0].view(-1) if self.in_place else torch.cat([g.flatten() for g in gradients])
            self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    @torch.no_grad()
    def receive(self) -> None:
        if self.work is None:
            return
        self.work.wait()
        if not self.in_place:
            parts = self.flat.split([g.numel() for g in self.gradients])
            torch._foreach_copy_(self.gradients, [part.view_as(g) for part, g in zip(parts, self.gradients)])


def _buckets(parameters: Iterable[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """In their order, each of at most so many bytes, or one larger parameter."""
    bucket: list[nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        if bucket and num_bytes + parameter.nbytes > most:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(parameter)
        num_bytes += parameter.nbytes
    if bucket:
        yield bucket
