"""Parts of the positions: where they lie, and what does not divide. Distributed tests compare what they compute."""

import pytest
import torch

from model.sequence import Span


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
