"""Toy data whose distribution is known: pairs and quadruples of digits, a needle in a haystack, points in the plane.

Row n of a source is a function of (seed, n), computed when asked for; fresh samples are the rows of another seed.

Shapes: B rows of a batch, L tokens of a row, P patterns of a support, K random words of a row.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.order import GOLDEN, WORD, mix
from data_pipeline.packing import Rows

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

PatternToy = Literal["deterministic", "non_uniform", "dependence", "d1", "d2", "needle"]
PointToy = Literal["checkerboard", "swissroll", "circles"]

NUM_DIGITS = 10
NUM_BINS = 100  # per dimension of a point
# What is rescaled to [0, 1]; rolls and circles end about there in 100,000 samples, and those beyond go to the last bin.
RANGES: dict[PointToy, tuple[tuple[float, float], tuple[float, float]]] = {
    "checkerboard": ((0, 0), (1, 1)),
    "swissroll": ((-10.2, -11.7), (13.3, 14.7)),
    "circles": ((-1.07, -1.07), (1.07, 1.07)),
}


class PatternSource:
    """Rows drawn from the support of a toy, all tokens maskable.

    toy, dependence: as in `support`. length: of a needle's row, at least 8; the tokens between the two ends are
    uniform digits. Every other toy has the length of its patterns.
    Raises ValueError for an unknown toy and for a length or dependence that the toy cannot have.
    """

    def __init__(
        self,
        toy: PatternToy,
        *,
        length: int | None = None,
        dependence: float | None = None,
        seed: int = 0,
        num_rows: int = 1_000_000,
    ) -> None:
        self.patterns_PL, self.probabilities_P = support(toy, dependence)
        width = self.patterns_PL.shape[1]
        self.length = width if length is None else length
        if self.length < width or (self.length > width and toy != "needle"):
            legal = f"at least {width}" if toy == "needle" else f"{width}, or none"
            raise ValueError(f"rows of the toy {toy!r} cannot have {length} tokens; set the length to {legal}")
        self._seed, self._num_rows = seed, num_rows

    def __len__(self) -> int:
        return self._num_rows

    def gather(self, indices: Int64Array) -> Rows:
        """Rows at indices [B]; see Source.gather."""
        num_inside = self.length - self.patterns_PL.shape[1]
        bits_BK = random_bits(self._seed, indices, 1 + num_inside)
        cumulative_P = np.cumsum(self.probabilities_P)
        drawn_B = np.searchsorted(cumulative_P / cumulative_P[-1], uniform(bits_BK[:, 0]), side="right")
        start_BL, end_BL = np.split(self.patterns_PL[drawn_B], 2, axis=1)
        haystack_BL = (bits_BK[:, 1:] % np.uint64(NUM_DIGITS)).astype(np.int64)
        return _maskable_rows(np.concatenate([start_BL, haystack_BL, end_BL], axis=1))


class PointSource:
    """Points of the plane in bins 0..99 per dimension, as rows of two tokens (VADD, Appendix B.1).

    checkerboard: uniform on two diagonal quadrants, entropy ln 5000. swissroll, circles: as scikit-learn makes them,
    the roll seen from the side (x and z) with noise 0.2, the circles with noise 0.02 and factor 0.5.
    num_rows: the size of a finite training set, 100,000 in the paper.
    Raises ValueError for an unknown toy.
    """

    def __init__(self, toy: PointToy, *, seed: int = 0, num_rows: int = 100_000) -> None:
        _check_toy(toy, get_args(PointToy))
        self._toy, self._seed, self._num_rows = toy, seed, num_rows

    def __len__(self) -> int:
        return self._num_rows

    def gather(self, indices: Int64Array) -> Rows:
        """Rows at indices [B]; see Source.gather."""
        low_2, high_2 = np.array(RANGES[self._toy])
        scaled_B2 = (points(self._toy, self._seed, indices) - low_2) / (high_2 - low_2)
        return _maskable_rows(np.clip(np.floor(scaled_B2 * NUM_BINS), 0, NUM_BINS - 1).astype(np.int64))


def support(toy: PatternToy, dependence: float | None = None) -> tuple[Int64Array, Float64Array]:
    """The patterns int64 [P, L] that a toy consists of, and their probabilities float64 [P], none of them 0.

    Two tokens (VMD, Section 4.1): deterministic, (k, k+1 mod 10) uniform in k; non_uniform, the same with
    probability (k+1) / 55; dependence, a uniform first token whose successor follows with the probability
    `dependence`, and each other digit with an equal share of the rest.
    Four tokens (Section 4.2): d1, (k, k+1, k+2, k+3); d2, (k, k+1, l, l+1).
    needle (Appendix D.2): the first four and the last four tokens of a row, (k, ..., k+3) at both ends.
    Raises ValueError for an unknown toy, and unless "dependence" has a dependence in [0, 1] and no other toy has one.
    """
    _check_toy(toy, get_args(PatternToy))
    in_range = dependence is not None and 0 <= dependence <= 1
    if not (in_range if toy == "dependence" else dependence is None):
        raise ValueError(
            f"the toy {toy!r} cannot have dependence {dependence}: give the toy 'dependence' one in [0, 1], others none"
        )
    digits = np.arange(NUM_DIGITS)
    if dependence is not None:
        return _dependent_pairs(dependence)
    if toy == "non_uniform":
        return _runs(digits, 2), (digits + 1) / 55
    if toy == "d2":
        first, second = np.divmod(np.arange(NUM_DIGITS**2), NUM_DIGITS)
        return np.hstack([_runs(first, 2), _runs(second, 2)]), np.full(NUM_DIGITS**2, NUM_DIGITS**-2.0)
    patterns = {"deterministic": _runs(digits, 2), "d1": _runs(digits, 4), "needle": np.tile(_runs(digits, 4), 2)}
    return patterns[toy], np.full(NUM_DIGITS, 1 / NUM_DIGITS)


def points(toy: PointToy, seed: int, indices: Int64Array) -> Float64Array:
    """Points float64 [B, 2] before they are rescaled and binned; see PointSource."""
    bits_BK = random_bits(seed, indices, 4)
    first_B, second_B = uniform(bits_BK[:, :2]).T
    if toy == "checkerboard":
        quadrant_B1 = bits_BK[:, 2:3] >> np.uint64(63)
        return (quadrant_B1 + np.stack([first_B, second_B], axis=1)) / 2
    if toy == "swissroll":
        roll_B = 1.5 * np.pi * (1 + 2 * first_B)
        return _polar(roll_B, roll_B) + 0.2 * _normal(bits_BK[:, 2:])
    return _polar(np.where(second_B < 0.5, 1.0, 0.5), 2 * np.pi * first_B) + 0.02 * _normal(bits_BK[:, 2:])


def random_bits(seed: int, indices: Int64Array, count: int) -> UInt64Array:
    """Random words [B, count]; word k of row n is a function of (seed, n, k): SplitMix64 streams."""
    key_1 = mix(mix(np.array([seed & WORD], np.uint64)))
    key_B1 = mix(indices.astype(np.uint64) ^ key_1)[:, None]
    return mix(key_B1 + np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN))


def uniform(bits: UInt64Array) -> Float64Array:
    """Float64 in [0, 1) from the upper 53 bits of each word."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _normal(bits_B2: UInt64Array) -> Float64Array:
    """Two standard normal draws [B, 2] from two words (Box-Muller)."""
    first_B, second_B = uniform(bits_B2).T
    return _polar(np.sqrt(-2 * np.log(1 - first_B)), 2 * np.pi * second_B)


def _polar(radius_B: Float64Array, angle_B: Float64Array) -> Float64Array:
    return radius_B[:, None] * np.stack([np.cos(angle_B), np.sin(angle_B)], axis=1)


def _runs(starts: Int64Array, length: int) -> Int64Array:
    """start, start + 1, ... modulo 10, one row per start."""
    return (starts[:, None] + np.arange(length)) % NUM_DIGITS


def _dependent_pairs(dependence: float) -> tuple[Int64Array, Float64Array]:
    first, second = np.divmod(np.arange(NUM_DIGITS**2), NUM_DIGITS)
    is_successor = second == (first + 1) % NUM_DIGITS
    probabilities = np.where(is_successor, dependence, (1 - dependence) / (NUM_DIGITS - 1)) / NUM_DIGITS
    possible = probabilities > 0
    return np.stack([first, second], axis=1)[possible], probabilities[possible]


def _check_toy(toy: str, legal: tuple[str, ...]) -> None:
    if toy not in legal:
        raise ValueError(f"unknown toy {toy!r}; legal: {', '.join(legal)}")


def _maskable_rows(tokens_BL: Int64Array) -> Rows:
    tokens = torch.from_numpy(tokens_BL)
    return {
        "tokens": tokens,
        "maskable": torch.ones_like(tokens, dtype=torch.bool),
        "positions": torch.arange(tokens.shape[1]).expand(tokens.shape),
    }
