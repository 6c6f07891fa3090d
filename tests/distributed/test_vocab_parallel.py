"""The vocab-parallel head on two and three processes against one process that holds the whole vocabulary."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from model.losses import VocabularySlice, masked_linear_cross_entropy

ROWS, WIDTH, VOCABULARY = 29, 8, 24
WORLD = 3


def whole_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets that visit every id, and weights, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.rand(ROWS, generator=generator)
    weight[-4:] = 0.0
    return hidden.to(dtype), head.to(dtype), torch.arange(ROWS) % VOCABULARY, weight


def compare(size: int, group: dist.ProcessGroup, forbidden: int | None, dtype: torch.dtype, chunk_bytes: int) -> None:
    """Raises AssertionError where this rank's slice differs from the single-process result."""
    hidden, head, targets, weight = whole_problem(dtype)
    if forbidden is not None:
        targets[targets == forbidden] = (forbidden + 1) % VOCABULARY
    hidden.requires_grad_()
    head.requires_grad_()
    expected, expected_rows = masked_linear_cross_entropy(hidden, head, targets, weight, forbidden=forbidden)
    expected_hidden, expected_head = torch.autograd.grad(3.0 * expected, (hidden, head))
    per_rank = -(-VOCABULARY // size)
    mine = slice(dist.get_rank(group) * per_rank, (dist.get_rank(group) + 1) * per_rank)
    part = VocabularySlice(group, mine.start, VOCABULARY)
    local = head.detach()[mine].clone().requires_grad_()
    loss, rows = masked_linear_cross_entropy(
        hidden, local, targets, weight, forbidden=forbidden, part=part, chunk_bytes=chunk_bytes
    )
    grad_hidden, grad_local = torch.autograd.grad(3.0 * loss, (hidden, local))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    pairs = {
        "loss": (loss, expected),
        "rows": (rows, expected_rows),
        "hidden": (grad_hidden, expected_hidden),
        "head": (grad_local, expected_head[mine]),
    }
    for name, (found, wanted) in pairs.items():
        error = (found - wanted).abs().max().item()
        bound = tolerance * max(1.0, wanted.abs().max().item())
        assert error <= bound, f"{name}: {error} with forbidden={forbidden}, size={size}, {dtype}"


def run_rank(rank: int, rendezvous: str) -> None:
    """All cases of one process: three ranks, then the first two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (3, 2)}
    for size, group in groups.items():
        if rank >= size:
            continue
        for forbidden in (None, 0, 7, 8, 11, 12, 15, 16, 22):
            for dtype in (torch.float32, torch.float64):
                for chunk_bytes in (1, 500, 2**20):
                    compare(size, group, forbidden, dtype, chunk_bytes)
    dist.destroy_process_group()


def test_slices_of_the_vocabulary_add_up(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
