import math

import numpy as np
import pytest
from scipy import stats

from data_pipeline.order import Order


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 + 1])
def test_each_epoch_is_a_permutation(seed: int) -> None:
    for length in [*range(1, 200), 255, 256, 257, 1000, 1024, 99_991]:
        found = Order(length, seed)(np.arange(3 * length)).reshape(3, length)
        assert np.array_equal(np.sort(found, axis=1), np.broadcast_to(np.arange(length), (3, length)))


def test_epochs_and_seeds_differ() -> None:
    first, second = Order(1000, 0)(np.arange(2000)).reshape(2, 1000)
    other = Order(1000, 1)(np.arange(1000))
    for one, two in ((first, second), (first, other), (second, other)):
        assert np.sum(one == two) < 10


def test_large_lengths_stay_in_range_and_do_not_repeat() -> None:
    for length in (2**31 + 11, 10**12, 2**61):
        found = Order(length, 3)(length * 3 + np.arange(100_000))
        assert found.min() >= 0
        assert found.max() < length
        assert len(np.unique(found)) == len(found)
        assert stats.kstest(found / length, "uniform").pvalue > 1e-4


def test_any_slicing_gives_the_same() -> None:
    order = Order(37, 9)
    positions = np.arange(500)
    whole = order(positions)
    assert whole.dtype == np.int64
    assert np.array_equal(np.concatenate([order(part) for part in np.array_split(positions, 13)]), whole)
    assert np.array_equal(order(positions[::-1])[::-1], whole)
    assert np.array_equal(order(positions.reshape(20, 25)), whole.reshape(20, 25))
    assert np.array_equal(positions, np.arange(500))


def test_no_structure_is_visible() -> None:
    length = 20_000
    found = Order(length, 4)(np.arange(3 * length))
    first, second = found[:length], found[length : 2 * length]
    limit = 4 / math.sqrt(length)
    for lag in (1, 2, 7, 141, 142, 143):  # 142 columns in the grid
        assert abs(stats.spearmanr(first[:-lag], first[lag:]).statistic) < limit
    assert abs(stats.spearmanr(first, np.arange(length)).statistic) < limit
    assert abs(stats.spearmanr(first, second).statistic) < limit
    _, counts = np.unique(np.diff(first), return_counts=True)
    assert counts.max() < 12  # a shuffle has Poisson(1) of the commonest differences
    for number in (2, 3, 142):
        table = np.histogram2d(first % number, np.arange(length) * number // length, bins=number)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("length", [3, 4, 5])
def test_every_permutation_of_a_few_is_as_likely(length: int) -> None:
    num_permutations = math.factorial(length)
    epochs = Order(length, 0)(np.arange(length * num_permutations * 100)).reshape(-1, length)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    assert len(counts) == num_permutations
    assert stats.chisquare(counts).pvalue > 1e-4


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Order(0, 0)
