import math
import pickle
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from data_pipeline.sudoku import (
    EMPTY,
    FEW_CLUES,
    UNIQUE_CLUES,
    Family,
    Split,
    SudokuSource,
    first_row_grids,
    is_valid,
    solutions,
)

IntArray = npt.NDArray[np.integer]
FAMILIES: list[Family] = ["unique", "few_clues"]
BOXES = {4: (2, 2), 6: (2, 3)}


def units(size: int) -> Iterator[list[int]]:
    """Cells that must differ, by the rules of the game."""
    height, width = BOXES[size]
    for n in range(size):
        yield [n * size + j for j in range(size)]
        yield [i * size + n for i in range(size)]
    for top, left in product(range(0, size, height), range(0, size, width)):
        yield [i * size + j for i in range(top, top + height) for j in range(left, left + width)]


def keeps_the_rules(grid: list[int], size: int) -> bool:
    return all(sorted(grid[cell] for cell in unit) == list(range(size)) for unit in units(size))


@cache
def all_grids() -> IntArray:
    """Every 4 x 4 grid, out of the 24^4 with permutations as rows."""
    rows = np.array(list(product(permutations(range(4)), repeat=4))).reshape(-1, 16)
    boxes = rows.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    columns = rows.reshape(-1, 4, 4).swapaxes(1, 2)
    full = np.array([0b1111])
    return rows[np.all([(1 << part).sum(2) == full for part in (columns, boxes)], axis=(0, 2))]


def backtrack(grid: list[int], size: int) -> int:
    """How many solutions there are, by trying every value in the first empty cell."""
    if EMPTY not in grid:
        return int(keeps_the_rules(grid, size))
    cell = grid.index(EMPTY)
    seen = {grid[other] for unit in units(size) if cell in unit for other in unit}
    return sum(backtrack([*grid[:cell], v, *grid[cell + 1 :]], size) for v in set(range(size)) - seen)


def gathered(source: SudokuSource, num_rows: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    rows = source.gather(np.arange(num_rows))
    return rows["tokens"].numpy(), ~rows["maskable"].numpy()


def sets(clue: npt.NDArray[np.bool_]) -> set[bytes]:
    return set(map(bytes, clue))


def test_all_grids_of_4_are_reached_by_renaming() -> None:
    assert len(all_grids()) == 288
    renamed = {tuple(np.array(names)[grid]) for names in permutations(range(4)) for grid in first_row_grids(4)}
    assert renamed == set(map(tuple, all_grids()))


def test_all_grids_of_6_are_reached_by_renaming() -> None:
    grids = first_row_grids(6)
    assert len(np.unique(grids, axis=0)) == len(grids)
    assert len(grids) * math.factorial(6) == 28_200_960  # the known number of grids with boxes of 2 x 3
    assert np.all(grids[:, :6] == np.arange(6))
    assert all(keeps_the_rules(grid, 6) for grid in grids[::40].tolist())


@pytest.mark.parametrize("size", [4, 6])
def test_validity_is_the_rules_of_the_game(size: int) -> None:
    generator = np.random.default_rng(0)
    grids = first_row_grids(size)[generator.integers(0, len(first_row_grids(size)), 200)].astype(np.int64)
    swapped = grids.copy()
    swapped[:, [0, 1]] = grids[:, [1, 0]]
    shifted = np.stack([(np.arange(size)[:, None] + np.arange(size)) % size] * 2).reshape(2, -1)  # only boxes fail
    masked = grids.copy()
    masked[np.arange(200), generator.integers(0, size**2, 200)] = size
    for tokens in (grids, swapped, shifted, masked):
        assert is_valid(tokens, size).tolist() == [keeps_the_rules(grid, size) for grid in tokens.tolist()]
    assert is_valid(grids, size).all()
    assert not is_valid(shifted, size).any()


def test_solutions_of_4_are_the_grids_that_agree() -> None:
    generator = np.random.default_rng(1)
    clues = np.where(generator.random((300, 16)) < 0.3, all_grids()[generator.integers(0, 288, 300)], EMPTY)
    contradictory = generator.random(300) < 0.3
    clues[contradictory, generator.integers(0, 16, contradictory.sum())] = 0
    clues = np.concatenate([clues, np.full((1, 16), EMPTY), all_grids()[:1], np.zeros((1, 16), int)])
    before = clues.copy()
    puzzle, grids = solutions(clues, 4)
    assert np.array_equal(clues, before)
    for number, clue in enumerate(clues):
        agree = all_grids()[np.all((clue == EMPTY) | (all_grids() == clue), axis=1)]
        assert set(map(tuple, grids[puzzle == number])) == set(map(tuple, agree))
        assert np.sum(puzzle == number) == len(agree)


def test_solutions_of_6_are_as_many_as_backtracking_finds() -> None:
    tokens, _ = gathered(SudokuSource(6, "few_clues", "train"), 30)
    clue = np.random.default_rng(2).random(tokens.shape) < np.linspace(0.3, 0.5, 30)[:, None]
    clues = np.where(clue, tokens, EMPTY)
    counts = np.bincount(solutions(clues, 6)[0], minlength=30).tolist()
    assert counts == [backtrack(puzzle, 6) for puzzle in clues.tolist()]
    assert 1 in counts
    assert max(counts) > 10


@pytest.mark.parametrize("split", ["train", "validation"])
def test_unique_puzzles_have_one_solution(split: Split) -> None:
    tokens, clue = gathered(SudokuSource(4, "unique", split), 2000)
    agree = np.all(~clue[:, None] | (all_grids() == tokens[:, None]), axis=2)
    assert np.all(agree.sum(1) == 1)
    tokens, clue = gathered(SudokuSource(6, "unique", split), 100)
    for puzzle in np.where(clue, tokens, EMPTY).tolist():
        assert backtrack(puzzle, 6) == 1


@pytest.mark.parametrize("size", [4, 6])
def test_digging_stops_at_the_wanted_clues_or_when_none_can_go(size: int) -> None:
    tokens, clue = gathered(SudokuSource(size, "unique", "train"), 5000)
    num_clues = clue.sum(1)
    fewest, most = UNIQUE_CLUES[size]
    assert num_clues.min() <= fewest + 1
    assert num_clues.max() == most
    counts = np.bincount(num_clues)
    assert stats.chisquare(counts[-3:]).pvalue > 1e-4  # all reach so many, and each is wanted as often
    for row in np.flatnonzero(num_clues == fewest)[:20]:
        one_less = ~np.eye(size**2, dtype=bool)[clue[row]]
        assert np.all(np.bincount(solutions(np.where(clue[row] & one_less, tokens[row], EMPTY), size)[0]) > 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [4, 6])
def test_no_puzzle_is_in_both_splits(size: int, family: Family) -> None:
    train, validation = (SudokuSource(size, family, split) for split in ("train", "validation"))
    assert not sets(gathered(train, 20_000)[1]) & sets(gathered(validation, 5000)[1])


def test_the_splits_share_all_sets_of_few_clues_nine_to_one() -> None:
    train, validation = (
        sets(gathered(SudokuSource(4, "few_clues", split), num_rows)[1])
        for split, num_rows in (("train", 100_000), ("validation", 20_000))
    )
    assert len(train) + len(validation) == sum(math.comb(16, k) for k in (1, 2, 3, 4))
    assert stats.binomtest(len(validation), 2516, 0.1).pvalue > 1e-4


@pytest.mark.parametrize("size", [4, 6])
def test_few_clues_are_a_random_set_of_a_number_in_range(size: int) -> None:
    splits: tuple[Split, ...] = ("train", "validation")
    clue = np.concatenate([gathered(SudokuSource(size, "few_clues", s), n)[1] for s, n in zip(splits, (9000, 1000))])
    fewest, most = FEW_CLUES[size]
    counts = np.bincount(clue.sum(1), minlength=most + 1)
    assert counts[:fewest].sum() == 0
    assert len(counts) == most + 1
    assert stats.chisquare(clue.sum(0)).pvalue > 1e-4  # no cell is preferred
    assert counts[fewest:].min() > 0.8 * counts[fewest:].mean()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_completion_of_few_clues_is_as_likely(split: Split) -> None:
    tokens, clue = gathered(SudokuSource(4, "few_clues", split, seed=4), 30_000)
    completions = np.all(~clue[:, None] | (all_grids() == tokens[:, None]), axis=2)
    is_it = np.all(all_grids() == tokens[:, None], axis=2)
    place = np.sum(completions & (is_it.cumsum(1) == 0), axis=1)  # of the solution among the completions
    for count in set(completions.sum(1)) - {1}:
        found = np.bincount(place[completions.sum(1) == count], minlength=count)
        assert found.sum() < 5 * count or stats.chisquare(found).pvalue > 1e-4
    assert stats.chisquare(is_it.sum(0)).pvalue > 1e-4


def test_grids_of_6_are_uniform() -> None:
    source = SudokuSource(6, "few_clues", "train", seed=1)
    tokens = source.gather(np.arange(400_000))["tokens"].numpy()
    names, counts = np.unique(tokens[:, :6] @ 6 ** np.arange(6), return_counts=True)
    assert len(names) == math.factorial(6)
    assert stats.chisquare(counts).pvalue > 1e-4
    renamed = np.take_along_axis(tokens[:, :6].argsort(1), tokens, axis=1)
    keys = (renamed[:, 6:] @ np.random.default_rng(0).integers(0, 2**56, 30)).astype(np.int64)
    _, counts = np.unique(keys, return_counts=True)
    assert stats.chisquare(np.pad(counts, (0, 39_168 - len(counts)))).pvalue > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [4, 6])
def test_rows_are_a_function_of_seed_and_index(size: int, family: Family) -> None:
    source = SudokuSource(size, family, "validation", num_rows=300)
    assert len(source) == 300
    rows, indices = source.gather(np.arange(300)), np.random.default_rng(0).permutation(300)
    before = indices.copy()
    assert set(rows) == {"tokens", "maskable", "positions"}
    assert [rows[name].dtype for name in rows] == [torch.int64, torch.bool, torch.int64]
    assert torch.equal(rows["positions"], torch.arange(size**2).repeat(300, 1))
    assert is_valid(rows["tokens"].numpy(), size).all()
    copy = pickle.loads(pickle.dumps(source))
    for name in rows:
        assert torch.equal(source.gather(indices)[name], rows[name][indices])
        assert torch.equal(copy.gather(indices)[name], rows[name][indices])
    assert np.array_equal(indices, before)
    longer = SudokuSource(size, family, "validation", num_rows=10**6)
    assert torch.equal(longer.gather(np.arange(300))["tokens"], rows["tokens"])


def test_seeds_differ() -> None:
    first, second = (gathered(SudokuSource(4, "unique", "train", seed=seed), 1000) for seed in (0, 1))
    assert np.mean(np.all(first[0] == second[0], axis=1)) < 0.02
    assert np.mean(np.all(first[1] == second[1], axis=1)) < 0.02


def test_what_a_source_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no Sudoku of 9 x 9 cells; set the size to 4 or 6"):
        SudokuSource(9, "unique", "train")
    with pytest.raises(ValueError, match="unknown Sudoku family 'hard'; legal: unique, few_clues"):
        SudokuSource(4, "hard", "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown split 'test'; legal: train, validation"):
        SudokuSource(4, "unique", "test")  # type: ignore[arg-type]
