"""Parts of the positions: where they lie, and what does not divide. Distributed tests compare what they compute."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.sequence import SequencePart, Span


def test_parts_are_contiguous_and_cover_the_row_in_order() -> None:
    row = torch.arange(12)[None]
    parts = [Span(rank, 4).take(row) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), row)
    assert all(part.shape == (1, 3) for part in parts)
    shared = row[:, :1]
    assert torch.equal(Span(2, 4).take(shared), shared), "one for all positions"


def test_positions_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^10 positions or blocks do not divide among 4 processes: change "):
        Span(0, 4).span(10)


@pytest.mark.parametrize(("segments", "length"), [(1, 24), (2, 12), (3, 8), (4, 6), (12, 2), (24, 1)])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_what_the_parts_pool_adds_up_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, segments: int, length: int, streams: int, size: int
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda summed, group: None)
    group: Any = None
    generator = torch.Generator().manual_seed(0)
    weight_BSR = torch.rand(2, segments, length, generator=generator)
    x_BLD = torch.rand(2, streams * segments * length, 5, generator=generator)
    wanted = [
        sum(weight_BSR[b, s, r] * x_BLD[b, s * length + r] for r in range(length))
        for b in range(2)
        for s in range(segments)
    ]
    parts = [SequencePart(rank, size, group) for rank in range(size)]
    found = sum(part.pool(weight_BSR, part.take(x_BLD)) for part in parts)
    assert torch.allclose(found.flatten(0, 1), torch.stack(wanted), atol=1e-5)  # type: ignore[union-attr, arg-type]
