"""Measures of samples, against the papers' printed values, exact expectations and scipy.

Shapes: N samples, P patterns, L tokens.
"""

import math

import numpy as np
import pytest
from scipy import stats

from data_pipeline.synthetic import Float64Array, Int64Array, PatternSource, PatternToy, PointSource, PointToy, support
from eval.synthetic import SET_SIZE, accuracy, kl, mean_kl, needle_ends, paired, sym_kl

PAIRS, UNIFORM = support("deterministic")
RISING = np.arange(1, 11) / 55


def independent(patterns_PL: Int64Array, probabilities_P: Float64Array, num_samples: int, seed: int = 0) -> Int64Array:
    """Tokens drawn each from its own marginal: what one step without a latent can do at best."""
    rng = np.random.default_rng(seed)
    columns = [rng.choice(column, num_samples, p=probabilities_P) for column in patterns_PL.T]
    return np.stack(columns, axis=1)


def exact_kl(num_patterns: int, hit: float) -> tuple[float, float]:
    """Mean and deviation of the KL of one set, each of the equal patterns being hit with probability `hit` a sample.

    The counts are taken as independent, which the few hits nearly are.
    """
    counts = np.arange(100)
    weights, logs = stats.binom.pmf(counts, SET_SIZE, hit), np.log(np.maximum(counts / SET_SIZE, 1e-12))
    mean = weights @ logs
    variance = weights @ (logs - mean) ** 2
    return -math.log(num_patterns) - mean, math.sqrt(variance / num_patterns)


@pytest.mark.parametrize(
    ("patterns_PL", "probabilities_P", "exact"),
    [(PAIRS, UNIFORM, 0.1), (PAIRS, RISING, 385 / 3025), (*support("d1"), 0.001), (*support("d2"), 0.01)],
)
def test_independent_tokens_are_as_accurate_as_chance(
    patterns_PL: Int64Array, probabilities_P: Float64Array, exact: float
) -> None:
    found = accuracy(independent(patterns_PL, probabilities_P, 100_000), patterns_PL)
    assert abs(found - exact) < 5 * math.sqrt(exact * (1 - exact) / 100_000)


def test_accuracy_counts_whole_patterns_only() -> None:
    samples = np.array([(0, 1), (9, 0), (0, 0), (1, 0), (10, 11), (3, 4)])
    assert accuracy(samples, PAIRS) == 3 / 6


@pytest.mark.parametrize(("toy", "printed", "scatter"), [("d1", 9.40, 2.0), ("d2", 7.10, 0.6)])
def test_kl_of_one_step_mdm_is_the_papers(toy: PatternToy, printed: float, scatter: float) -> None:
    patterns_PL, uniform = support(toy)
    num_patterns, num_sets = len(patterns_PL), 30
    exact, deviation = exact_kl(num_patterns, 1e-4)
    assert (exact, deviation) == (pytest.approx(printed, abs=0.005), pytest.approx(scatter, abs=0.1))
    found = mean_kl(patterns_PL, uniform, independent(patterns_PL, uniform, num_sets * SET_SIZE))
    assert abs(found[0] - exact) < 4 * deviation / math.sqrt(num_sets)
    assert found[1] == pytest.approx(deviation, rel=0.4)


def test_kl_of_two_tokens_drawn_independently_is_their_mutual_information() -> None:
    for probabilities, printed in ((UNIFORM, 2.3), (RISING, 2.2)):
        found = kl(PAIRS, probabilities, independent(PAIRS, probabilities, 1_000_000))
        assert found == pytest.approx(stats.entropy(probabilities), abs=0.01)
        assert found == pytest.approx(printed, abs=0.1)


def test_kl_against_scipy_where_every_pair_is_held() -> None:
    pairs, probabilities = support("dependence", 0.3)
    samples = np.random.default_rng(1).permutation(np.repeat(pairs, np.arange(1, 101), axis=0))
    assert kl(pairs, probabilities, samples) == pytest.approx(stats.entropy(probabilities, np.arange(1, 101)))


def test_kl_has_a_direction_a_ceiling_and_a_zero() -> None:
    exact = np.repeat(PAIRS, np.arange(1, 11), axis=0)
    assert kl(PAIRS, RISING, exact) == pytest.approx(0, abs=1e-12)
    assert kl(PAIRS, UNIFORM, exact) == pytest.approx(stats.entropy(UNIFORM, RISING))
    assert kl(PAIRS, RISING, np.concatenate([exact, exact + 100])) == pytest.approx(math.log(2))
    assert kl(PAIRS, UNIFORM, PAIRS + 100) == pytest.approx(25.33, abs=0.005)


def test_mean_kl_is_taken_over_sets() -> None:
    half_missing = np.concatenate([PAIRS[:5], PAIRS[:5]])
    mean, deviation = mean_kl(PAIRS, UNIFORM, np.concatenate([PAIRS, half_missing]), set_size=10)
    second = 0.5 * math.log(0.1 / 0.2) + 0.5 * (math.log(0.1) - math.log(1e-12))
    assert mean == pytest.approx(second / 2)
    assert deviation == pytest.approx(second / math.sqrt(2))
    for size in (10, 4):
        with pytest.raises(AssertionError, match="sets of"):
            mean_kl(PAIRS, UNIFORM, PAIRS, set_size=size)


def test_needle_is_read_at_both_ends() -> None:
    """Of ten needles one is learnt, in 4.82% of the samples: the paper's L = 40."""
    ends, uniform = support("needle")
    data = PatternSource("needle", length=40).gather(np.arange(SET_SIZE))["tokens"].numpy()
    assert accuracy(needle_ends(data), ends) == 1.0
    assert kl(ends, uniform, needle_ends(data)) < 0.001
    one = needle_ends(data[data[:, 0] == 3])
    samples = np.concatenate([one[:964], independent(ends, uniform, SET_SIZE - 964)])
    assert accuracy(samples, ends) == pytest.approx(0.0482, abs=1e-4)
    assert kl(ends, uniform, samples) == pytest.approx(22.87, abs=0.01)


@pytest.mark.parametrize(
    ("toy", "one_step", "floor"), [("checkerboard", 1.38, 0.051), ("swissroll", 2.57, 0.024), ("circles", 2.26, 0.031)]
)
def test_sym_kl_of_the_toys_is_vadds(toy: PointToy, one_step: float, floor: float) -> None:
    """Independent dimensions, and the data against itself; docs/errata.md."""
    data, fresh = (PointSource(toy, seed=seed).gather(np.arange(100_000))["tokens"].numpy() for seed in (0, 1))
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(fresh[:, 0]), rng.permutation(fresh[:, 1])], axis=1)
    assert sym_kl(data, shuffled) == pytest.approx(one_step, abs=0.03)
    assert sym_kl(data, fresh) == pytest.approx(floor, abs=0.003)


def test_sym_kl_against_scipy() -> None:
    rng = np.random.default_rng(0)
    samples = [np.minimum(rng.geometric(rate, (500, 2)) - 1, 6) for rate in (0.3, 0.6)]
    p, q = (np.histogram2d(*s.T, bins=np.arange(8) - 0.5)[0].ravel() / 500 + 1e-6 for s in samples)
    assert sym_kl(*samples, num_values=7) == pytest.approx((stats.entropy(p, q) + stats.entropy(q, p)) / 2)
    assert sym_kl(samples[0], samples[0], num_values=7) == 0
    with pytest.raises(ValueError, match="invalid entry"):
        sym_kl(*samples, num_values=6)


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("num_pairs", [2, 5, 9])
def test_paired_is_scipys_permutation_test(num_pairs: int, shift: float) -> None:
    first, second = np.random.default_rng(num_pairs).normal(size=(2, num_pairs))
    first = np.round(first + shift, 1)  # ties among the sums
    mean, p = paired(first.tolist(), second.round(1).tolist())
    expected = stats.permutation_test(
        (first - second.round(1),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, axis=0
    )
    assert mean == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue)


def test_paired_agrees_with_the_t_test_where_that_holds() -> None:
    first, second = np.random.default_rng(3).normal([[0.5], [0.0]], size=(2, 18))
    assert paired(first, second)[1] == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)


def test_five_seeds_can_not_be_significant_and_six_can() -> None:
    assert paired([1.0] * 5, [0.0] * 5) == (1.0, 2 / 2**5)
    assert paired([0.0] * 6, [1.0] * 6) == (-1.0, 2 / 2**6)
    assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 1.0)
