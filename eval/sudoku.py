"""Whether completed Sudoku grids are solutions of their puzzles.

Shapes: B puzzles, C cells of a grid.
"""

import numpy as np

from data_pipeline.sudoku import BoolArray, IntArray, is_valid


def validity(grids_BC: IntArray, puzzles_BC: IntArray, maskable_BC: BoolArray, size: int) -> float:
    """Share of grids that keep the clues of their puzzle, its cells that are not maskable, and break no rule.

    Where a puzzle has one solution this is the share of puzzles solved (VMD Table 3).
    """
    kept_B = np.all(maskable_BC | (grids_BC == puzzles_BC), axis=1)
    return float(np.mean(kept_B & is_valid(grids_BC, size)))
