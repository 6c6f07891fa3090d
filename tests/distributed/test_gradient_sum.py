"""Sums of gradients over processes: every size of bucket, accumulation, any order of arrival, what has no gradient."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pretrain.parallel.gradient_sum import GradientSum

WORLD = 2


class Net(nn.Module):
    """Uses its parameters in another order than it holds them, one of them never, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"first": (5, 3), "unused": (7,), "frozen": (3,), "second": (3, 11), "third": (11,)}
        draws = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size, generator=draws)))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.first * self.frozen).tanh() @ self.second * self.third).square().sum()


def inputs(rank: int, part: int) -> Tensor:
    """What a process computes on in its first or second micro-batch."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * rank + part))


def plain(parts: int) -> dict[str, Tensor]:
    """Gradients of all inputs of all processes, in one."""
    net = Net()
    for rank in range(WORLD):
        for part in range(parts):
            net(inputs(rank, part)).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def run_rank(rank: int, rendezvous: str) -> None:
    """Every size of bucket and number of micro-batches on this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    assert dist.group.WORLD is not None
    for bucket_bytes in (1, 100, 180, 2**20):
        net = Net()
        total = GradientSum(net.parameters(), dist.group.WORLD, bucket_bytes)
        for parts in (1, 2, 1):
            for part in range(parts):
                total.expect(last=part == parts - 1)
                net(inputs(rank, part)).backward()
            total.finish()
            wanted = plain(parts)
            for name, parameter in net.named_parameters():
                where = f"{name}, buckets of {bucket_bytes} bytes, {parts} micro-batches"
                assert (parameter.grad is None) == (name not in wanted), where
                if parameter.grad is not None:
                    torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-6, msg=where)
                parameter.grad = None
    dist.destroy_process_group()


def test_gradients_of_all_processes_add_up(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
