"""In which order a run sees its data: a pseudo-random permutation per epoch, computed index by index.

Nothing is stored: the state of the order is the next position, an integer. A Feistel network over the grid
rows x columns with rows * columns >= length permutes the grid; values at or beyond length walk on until they
fall below it (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

import math

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
NUM_ROUNDS = 16  # with 8, the permutations of five samples are visibly not equally likely


class Order:
    """Maps positions 0, 1, 2, ... to indices below `length`: each index once an epoch.

    An epoch is `length` positions and has its own permutation, keyed by (seed, epoch). Any positions can be
    asked for at any time.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"the data has {length} samples to order; give at least one")
        self.length = length
        self.seed = seed
        self._num_columns = math.isqrt(length - 1) + 1
        self._num_rows = -(-length // self._num_columns)

    def __call__(self, positions: Int64Array) -> Int64Array:
        """Source indices at global sample positions, int64 of the same shape."""
        assert np.all(positions >= 0), "positions count from 0"
        epochs, index = np.divmod(positions.astype(np.int64, copy=False), self.length)
        keys = mix(epochs.astype(np.uint64) ^ np.uint64(_mix_int(self.seed & WORD)))
        index = self._permute(index, keys)
        while np.any(outside := index >= self.length):
            index[outside] = self._permute(index[outside], keys[outside])
        return index

    def _permute(self, index: Int64Array, keys: UInt64Array) -> Int64Array:
        """One pass over the whole grid: rows and columns move each other in turn."""
        row, column = (part.astype(np.uint64) for part in np.divmod(index, self._num_columns))
        num_rows, num_columns = np.uint64(self._num_rows), np.uint64(self._num_columns)
        for number in range(0, NUM_ROUNDS, 2):
            row = (row + mix(column + _round_keys(keys, number)) % num_rows) % num_rows
            column = (column + mix(row + _round_keys(keys, number + 1)) % num_columns) % num_columns
        return (row * num_columns + column).astype(np.int64)


def _round_keys(keys: UInt64Array, number: int) -> UInt64Array:
    return mix(keys + np.uint64(number * GOLDEN & WORD))


def mix(values: UInt64Array) -> UInt64Array:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014), elementwise modulo 2^64."""
    values = values + np.uint64(GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(mix(np.array([value], np.uint64))[0])
