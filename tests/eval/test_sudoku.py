"""Validity of completed grids, against the rules written out and against every solution of a puzzle."""

import itertools

import numpy as np

from data_pipeline.sudoku import EMPTY, IntArray, SudokuSource, first_row_grids, solutions
from eval.sudoku import validity


def breaks_no_rule(grid: IntArray) -> bool:
    """4 x 4, cell by cell: no equal value in the same row, column or box."""
    cells = list(itertools.product(range(4), repeat=2))
    for (row, column), (other_row, other_column) in itertools.combinations(cells, 2):
        box = (row // 2, column // 2) == (other_row // 2, other_column // 2)
        seen = row == other_row or column == other_column or box
        if seen and grid[4 * row + column] == grid[4 * other_row + other_column]:
            return False
    return True


def test_a_damaged_grid_counts_as_the_rules_say() -> None:
    """One cell of each valid grid is changed, or two are swapped, or none is."""
    rng = np.random.default_rng(0)
    puzzles = np.repeat(first_row_grids(4), 20, axis=0)
    grids = puzzles.copy()
    for number, grid in enumerate(grids):
        first, second = rng.choice(16, 2, replace=False)
        if number % 3 == 0:
            grid[first] = (grid[first] + 1) % 4
        if number % 3 == 1:
            grid[[first, second]] = grid[[second, first]]
    clues = rng.random(grids.shape) < 0.2
    expected = [
        breaks_no_rule(grid) and all(grid[cell] == puzzle[cell] for cell in np.flatnonzero(clue))
        for grid, puzzle, clue in zip(grids, puzzles, clues)
    ]
    assert 0 < sum(expected) < len(grids)
    assert validity(grids, puzzles, ~clues, 4) == np.mean(expected)


def test_every_solution_of_a_puzzle_is_valid_for_it_and_for_none_with_other_clues() -> None:
    for size, rows in ((4, 20), (6, 3)):
        batch = SudokuSource(size, "few_clues", "validation").gather(np.arange(40))
        tokens, maskable = batch["tokens"].numpy(), batch["maskable"].numpy()
        most_clues = np.argsort(maskable.sum(1))[:rows]
        tokens, maskable = tokens[most_clues], maskable[most_clues]
        puzzle, grids = solutions(np.where(maskable, EMPTY, tokens), size)
        assert len(grids) > rows
        assert validity(grids, tokens[puzzle], maskable[puzzle], size) == 1.0
        assert validity((grids + 1) % size, tokens[puzzle], maskable[puzzle], size) == 0.0, "valid, other clues"
        assert validity(np.full_like(grids, size), tokens[puzzle], np.ones_like(grids, bool), size) == 0.0
