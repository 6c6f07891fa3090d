"""Masks of blocks, streams and documents against a brute-force restatement of what a query may see."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.masks import Annealing, MaskSpec

CPU = torch.device("cpu")
SIZES = [(8, 1), (8, 2), (8, 4), (8, 8), (6, 3), (7, 7)]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, -1, -1]])


def may_see(query: int, key: int, length: int, block_size: int) -> bool:
    """Over [first stream | clean]: same block and same half; or an earlier clean block; or both clean, not later."""
    query_clean, key_clean = query >= length, key >= length
    query_block, key_block = query % length // block_size, key % length // block_size
    if query_block == key_block and query_clean == key_clean:
        return True
    if not query_clean and key_clean and key_block < query_block:
        return True
    return query_clean and key_clean and key_block <= query_block


def by_hand(length: int, block_size: int) -> Tensor:
    places = range(2 * length)
    return torch.tensor([[may_see(q, k, length, block_size) for k in places] for q in places])


def visible(spec: MaskSpec, count: int, num_queries: int | None = None) -> Tensor:
    found = spec.visible(num_queries or count, count, CPU)
    assert found is not None
    assert found.dtype == torch.bool
    return found[:, 0]


@pytest.mark.parametrize(("length", "block_size"), SIZES)
def test_two_streams_see_what_is_written(length: int, block_size: int) -> None:
    found = visible(MaskSpec(block_size=block_size, two_streams=True), 2 * length)
    assert torch.equal(found[0], by_hand(length, block_size))


@pytest.mark.parametrize(("length", "block_size"), SIZES)
def test_one_stream_is_the_clean_half(length: int, block_size: int) -> None:
    found = visible(MaskSpec(block_size=block_size), length)
    assert torch.equal(found[0], by_hand(length, block_size)[length:, length:])


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("two", [False, True])
def test_documents_restrict_blocks_further(block_size: int, two: bool) -> None:
    spec = MaskSpec(document_BL=DOCUMENTS, block_size=block_size, two_streams=two)
    found = visible(spec, 16 if two else 8)
    blocks = by_hand(8, block_size) if two else by_hand(8, block_size)[8:, 8:]
    for row, document_L in enumerate(DOCUMENTS.tolist()):
        both = document_L * (2 if two else 1)
        same = torch.tensor([[one == other for other in both] for one in both])
        assert torch.equal(found[row], blocks & same)
    assert found.diagonal(dim1=1, dim2=2).all()


def test_documents_alone_and_causal_ones() -> None:
    same = DOCUMENTS[:, :, None] == DOCUMENTS[:, None]
    assert torch.equal(visible(MaskSpec(document_BL=DOCUMENTS), 8), same)
    assert torch.equal(visible(MaskSpec("causal", DOCUMENTS), 8), same.tril())


def test_blocks_of_one_are_causal_and_a_block_of_all_sees_everything() -> None:
    one = visible(MaskSpec(block_size=1), 8)
    assert torch.equal(one, visible(MaskSpec(direction="causal"), 8))
    assert visible(MaskSpec(block_size=8), 8).all()
    streams = visible(MaskSpec(block_size=8, two_streams=True), 16)[0]
    assert streams[:8, :8].all()
    assert not streams[:8, 8:].any()
    assert not streams[8:, :8].any()


def test_a_clean_query_never_sees_the_first_stream() -> None:
    for length, block_size in SIZES:
        assert not visible(MaskSpec(block_size=block_size, two_streams=True), 2 * length)[0, length:, :length].any()


@pytest.mark.parametrize("spec", [MaskSpec(block_size=2), MaskSpec("causal"), MaskSpec(document_BL=DOCUMENTS)], ids=str)
def test_queries_are_the_last_of_the_keys(spec: MaskSpec) -> None:
    assert torch.equal(visible(spec, 8, 3), visible(spec, 8)[:, -3:])


def test_nothing_hidden_needs_no_mask() -> None:
    assert MaskSpec().visible(8, 8, CPU) is None
    assert MaskSpec("causal").visible(1, 8, CPU) is None


def opened(ratio: float, key: int | None, document_BL: Tensor | None = None, length: int = 64) -> Tensor:
    return visible(MaskSpec("causal", document_BL, annealing=Annealing(ratio, key)), length)


@pytest.mark.parametrize("key", [None, 3, 2**64 - 1])
def test_annealing_opens_a_causal_mask_until_all_is_seen(key: int | None) -> None:
    """What has once been seen under a key stays so; the past is always seen."""
    masks = [opened(ratio, key)[0] for ratio in (0.0, 0.2, 0.5, 0.9, 1.0)]
    assert torch.equal(masks[0], torch.ones(64, 64, dtype=torch.bool).tril())
    assert masks[-1].all()
    for less, more in pairwise(masks):
        assert (more | ~less).all()
        assert more.sum() > less.sum()


def test_annealing_by_chance_shows_the_share_that_is_asked_for_wherever_it_lies() -> None:
    """Each pair on its own: neither queries, keys, distances nor keys of the draw are favoured."""
    length, ratio = 96, 0.3
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    draws = torch.stack([opened(ratio, key, length=length)[0] for key in range(200)]).float()
    assert float(draws[:, ahead].mean()) == pytest.approx(ratio, abs=0.002)
    assert float((draws.mean(0)[ahead] - ratio).std()) == pytest.approx((ratio * (1 - ratio) / 200) ** 0.5, rel=0.05)
    pairs = draws[:, ahead] - ratio
    neighbours = (pairs[:, 1:] * pairs[:, :-1]).mean() / pairs.square().mean()
    steps = (pairs[1:] * pairs[:-1]).mean() / pairs.square().mean()
    assert abs(float(neighbours)) < 0.01
    assert abs(float(steps)) < 0.01


def test_the_window_shows_the_nearest_and_documents_restrict_it() -> None:
    place = torch.arange(8)
    near = place[None, :] - place[:, None] <= 2
    assert torch.equal(opened(0.25, None, length=8)[0], near)
    same = DOCUMENTS[:, :, None] == DOCUMENTS[:, None]
    assert torch.equal(opened(0.25, None, DOCUMENTS, length=8), same & near)
    assert torch.equal(opened(0.5, 9, DOCUMENTS, length=8), same & opened(0.5, 9, length=8))
