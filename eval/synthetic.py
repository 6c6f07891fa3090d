"""What samples of the controlled data sets are worth, and whether one system beats another over seeds.

Every measure needs samples only. Directions, sample counts and floors are decoded from the papers' tables: see
docs/errata.md.

Shapes: N samples, P patterns of the data, L tokens of a sequence; C cells of a histogram.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.synthetic import Float64Array, Int64Array

SET_SIZE = 20_000
FLOOR = 1e-12
NEEDLE_LENGTH = 4
MOST_PAIRS = 24


def accuracy(samples_NL: Int64Array, patterns_PL: Int64Array) -> float:
    """Share of samples that are one of the patterns (VMD Tables 1, 2 and 6).

    With the first token given it is VMD's condAcc: a given token is kept, and the pattern must contain it.
    """
    return float(_matches_NP(samples_NL, patterns_PL).any(1).mean())


def kl(patterns_PL: Int64Array, probabilities_P: Float64Array, samples_NL: Int64Array, floor: float = FLOOR) -> float:
    """KL(data || samples) in nats, the samples' frequencies at least `floor` (VMD Tables 1, 2 and 6)."""
    assert np.isclose(probabilities_P.sum(), 1.0), "the patterns are all that the data holds"
    frequencies_P = np.maximum(_matches_NP(samples_NL, patterns_PL).mean(0), floor)
    return float(probabilities_P @ np.log(probabilities_P / frequencies_P))


def mean_kl(
    patterns_PL: Int64Array, probabilities_P: Float64Array, samples_NL: Int64Array, set_size: int = SET_SIZE
) -> tuple[float, float]:
    """Mean and standard deviation of `kl` over sets of `set_size` samples.

    One set of 20,000 scatters by 2.0 when four tokens are drawn independently (docs/errata.md).
    """
    num_sets, rest = divmod(len(samples_NL), set_size)
    assert num_sets > 1, f"{len(samples_NL)} samples are less than two sets of {set_size}"
    assert rest == 0, f"{len(samples_NL)} samples are no whole number of sets of {set_size}"
    sets = [kl(patterns_PL, probabilities_P, part_NL) for part_NL in np.split(samples_NL, num_sets)]
    return float(np.mean(sets)), float(np.std(sets, ddof=1))


def needle_ends(samples_NL: Int64Array) -> Int64Array:
    """The two needles of each sequence without the haystack, [N, 8] (VMD Appendix D.2)."""
    return np.concatenate([samples_NL[:, :NEEDLE_LENGTH], samples_NL[:, -NEEDLE_LENGTH:]], axis=1)


def sym_kl(first_N2: Int64Array, second_N2: Int64Array, num_values: int = 100) -> float:
    """(KL(p, q) + KL(q, p)) / 2 of the histograms in nats, 1e-6 added to each cell before they are renormalised.

    This is what VADD Table 1 calls a JS divergence (docs/errata.md). Two samples of the same data are not at zero.
    """
    p_C, q_C = (_histogram_C(samples, num_values) for samples in (first_N2, second_N2))
    return float(((p_C - q_C) * np.log(p_C / q_C)).sum() / 2)


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of `first - second` over paired runs, and its two-sided p value: an exact sign-flip permutation test.

    Under the null each difference is as likely to have the other sign. The smallest p of n pairs is 2 / 2^n, so
    fewer than six can not reach 0.05.
    """
    assert 0 < len(first) == len(second) <= MOST_PAIRS, "every combination of signs is tried"
    differences = np.array(first, dtype=float) - np.array(second, dtype=float)
    sums = differences[:1]  # flipping every sign leaves the size of the sum, so the first sign is fixed
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()
    return float(differences.mean()), float((np.abs(sums) >= observed - slack).mean())


def _matches_NP(samples_NL: Int64Array, patterns_PL: Int64Array) -> npt.NDArray[np.bool_]:
    """Which pattern each sample is."""
    assert samples_NL.shape[1] == patterns_PL.shape[1], f"{samples_NL.shape} against {patterns_PL.shape}"
    return (samples_NL[:, None] == patterns_PL).all(-1)


def _histogram_C(samples_N2: Int64Array, num_values: int) -> Float64Array:
    cells_N = np.ravel_multi_index(tuple(samples_N2.T), (num_values, num_values))
    frequencies_C = np.bincount(cells_N, minlength=num_values**2) / len(cells_N) + 1e-6
    return frequencies_C / frequencies_C.sum()
