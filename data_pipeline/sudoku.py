"""Sudoku of 4 x 4 and 6 x 6 cells: a row is a grid in which clues are visible and the other cells are maskable.

Grids are exactly uniform: those with first row 0, 1, ..., N-1 are enumerated (12 of 288, 39,168 of 28,200,960), one
of them is drawn and its values are renamed by a random permutation.

Shapes: B puzzles, N values (and cells of a row, column or box), C = N * N cells in reading order, U = 3 N units
(rows, columns, boxes), G enumerated or dug grids, S solutions (partial ones too), K random words.
"""

from functools import cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.order import mix
from data_pipeline.packing import Rows
from data_pipeline.synthetic import random_bits

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]

Family = Literal["unique", "few_clues"]
Split = Literal["train", "validation"]

EMPTY = -1
BOXES = {4: (2, 2), 6: (2, 3)}  # rows and columns of a box
FEW_CLUES = {4: (1, 4), 6: (4, 9)}  # fewest, most
UNIQUE_CLUES = {4: (4, 8), 6: (8, 16)}  # at which digging stops
NUM_DUG = 10_000
VALIDATION_SHARE = 10  # one in so many sets of clue cells
NEXT_PUZZLE = 2**40  # from a row's puzzle number to that of its next attempt, beyond any number of rows


class SudokuSource:
    """Puzzles with their solution as the tokens, digit d as value d - 1; clues are not maskable.

    size: 4 (boxes of 2 x 2) or 6 (boxes of 2 rows x 3 columns).
    family: "few_clues" shows a random set of 1-4 cells (size 4) or 4-9 (size 6) of a uniform grid, so that the
    solution is uniform over the completions of its clues. "unique" has exactly one solution: 10,000 uniform grids
    are dug cell by cell, in random order, while they stay unique and until a number of clues drawn from 4-8 or 8-16;
    a row shows one of them with its values renamed.
    split: one in ten sets of clue cells, chosen by hash, is for validation only, so no puzzle is in both splits.
    Raises ValueError for any other size, family or split.
    """

    def __init__(self, size: int, family: Family, split: Split, *, num_rows: int = 100_000, seed: int = 0) -> None:
        if size not in BOXES:
            raise ValueError(f"no Sudoku of {size} x {size} cells; set the size to 4 or 6")
        if family not in get_args(Family):
            raise ValueError(f"unknown Sudoku family {family!r}; legal: {', '.join(get_args(Family))}")
        if split not in get_args(Split):
            raise ValueError(f"unknown split {split!r}; legal: {', '.join(get_args(Split))}")
        self._size, self._split, self._num_rows, self._seed = size, split, num_rows, seed
        self._grids_GC, self._clues_GC = first_row_grids(size), None
        if family == "unique":
            self._grids_GC, self._clues_GC = _dig(size, seed)

    def __len__(self) -> int:
        return self._num_rows

    def gather(self, indices: Int64Array) -> Rows:
        """Rows at indices [B]; see Source.gather."""
        number_B = indices.copy()
        grid_BC, clue_BC = self._puzzles(number_B)
        while np.any(other_B := _is_held_out(clue_BC) != (self._split == "validation")):
            number_B[other_B] += NEXT_PUZZLE
            grid_BC[other_B], clue_BC[other_B] = self._puzzles(number_B[other_B])
        tokens = torch.from_numpy(grid_BC)
        return {
            "tokens": tokens,
            "maskable": torch.from_numpy(~clue_BC),
            "positions": torch.arange(tokens.shape[1]).expand(tokens.shape),
        }

    def _puzzles(self, number_B: Int64Array) -> tuple[Int64Array, BoolArray]:
        """Full grids [B, C] and which cells are clues [B, C], whatever their split."""
        bits_BK = random_bits(self._seed, number_B, self._size + 2 + self._size**2)
        names_BN, drawn_B = bits_BK[:, : self._size].argsort(1), _below(bits_BK[:, self._size], len(self._grids_GC))
        grid_BC = np.take_along_axis(names_BN, self._grids_GC[drawn_B], axis=1)
        if self._clues_GC is not None:
            return grid_BC, self._clues_GC[drawn_B]
        num_clues_B = _between(bits_BK[:, self._size + 1], FEW_CLUES[self._size])
        return grid_BC, bits_BK[:, self._size + 2 :].argsort(1) < num_clues_B[:, None]


def is_valid(tokens_BC: IntArray, size: int) -> BoolArray:
    """Which grids have each value once in every row, column and box, bool [B]; any integers may be in the cells."""
    return np.all(np.sort(tokens_BC[:, _units(size)], axis=2) == np.arange(size), axis=(1, 2))


def solutions(clues_BC: IntArray, size: int) -> tuple[Int64Array, IntArray]:
    """All solutions of all puzzles, cells that are no clues being EMPTY (-1).

    Returns the puzzle of each solution, int64 [S] (so its bincount counts them), and the grids [S, C].
    A search in width over all puzzles at once: the cell with the fewest free values gets each of them in turn.
    """
    puzzle_S, grid_SC = np.arange(len(clues_BC)), clues_BC
    while np.any(empty_SC := grid_SC == EMPTY):
        value_bit_SC = np.where(empty_SC, 0, 1 << grid_SC.clip(0)).astype(np.uint8)
        used_SU = np.bitwise_or.reduce(value_bit_SC[:, _units(size)], axis=2)
        free_SC = ~np.bitwise_or.reduce(used_SU[:, _units_of_cells(size)], axis=2) & (2**size - 1)
        choices_SC = np.where(empty_SC, np.bitwise_count(free_SC), size + 1)
        cell_S = choices_SC.argmin(1)
        options_SC = np.where(empty_SC, free_SC, value_bit_SC)  # a full grid keeps the value that it has
        options_SN = options_SC[np.arange(len(cell_S)), cell_S, None] >> np.arange(size) & 1
        from_S, value_S = np.nonzero(options_SN)
        puzzle_S, grid_SC = puzzle_S[from_S], grid_SC[from_S]
        grid_SC[np.arange(len(from_S)), cell_S[from_S]] = value_S
    valid_S = is_valid(grid_SC, size)  # clues may contradict each other
    return puzzle_S[valid_S], grid_SC[valid_S]


@cache
def first_row_grids(size: int) -> IntArray:
    """All grids int8 [G, C] whose first row is 0, 1, ..., size - 1."""
    clues_1C = np.full((1, size**2), EMPTY, np.int8)
    clues_1C[0, :size] = np.arange(size)
    return solutions(clues_1C, size)[1]


@cache
def _dig(size: int, seed: int) -> tuple[IntArray, BoolArray]:
    """Uniform grids [G, C] with first row 0, 1, ..., and clues [G, C] that leave one solution."""
    bits_GK = random_bits(seed, -1 - np.arange(NUM_DUG), 2 + size**2)  # numbers below 0: no row uses their words
    grids_GC = first_row_grids(size)[_below(bits_GK[:, 0], len(first_row_grids(size)))]
    wanted_G, cells_GC = _between(bits_GK[:, 1], UNIQUE_CLUES[size]), bits_GK[:, 2:].argsort(1)
    dug_GC = grids_GC.copy()
    for cell_G in cells_GC.T:
        rows = np.flatnonzero(np.sum(dug_GC != EMPTY, axis=1) > wanted_G)
        trial_BC = dug_GC[rows]
        trial_BC[np.arange(len(rows)), cell_G[rows]] = EMPTY
        unique_B = np.bincount(solutions(trial_BC, size)[0], minlength=len(rows)) == 1
        dug_GC[rows[unique_B]] = trial_BC[unique_B]
    return grids_GC, dug_GC != EMPTY


def _is_held_out(clue_BC: BoolArray) -> BoolArray:
    cell_set_B = clue_BC @ (np.uint64(1) << np.arange(clue_BC.shape[1], dtype=np.uint64))
    return mix(cell_set_B) % np.uint64(VALIDATION_SHARE) == 0


def _below(bits_B: UInt64Array, count: int) -> Int64Array:
    return (bits_B % np.uint64(count)).astype(np.int64)


def _between(bits_B: UInt64Array, ends: tuple[int, int]) -> Int64Array:
    return ends[0] + _below(bits_B, ends[1] - ends[0] + 1)


@cache
def _units(size: int) -> Int64Array:
    """The cells of each row, column and box, int64 [U, N]."""
    cells = np.arange(size**2).reshape(size, size)
    height, width = BOXES[size]
    boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)
    return np.concatenate([cells, cells.T, boxes])


@cache
def _units_of_cells(size: int) -> Int64Array:
    """The row, column and box of each cell, int64 [C, 3]."""
    return np.argsort(_units(size).ravel(), kind="stable").reshape(size**2, 3) // size
