import math
import pickle
from collections import Counter
from itertools import combinations, product
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from data_pipeline.synthetic import (
    NUM_BINS,
    RANGES,
    PatternSource,
    PatternToy,
    PointSource,
    PointToy,
    points,
    random_bits,
    support,
    uniform,
)

DIGITS = range(10)
Counts = npt.NDArray[np.float64]


def joint(toy: PatternToy, dependence: float | None) -> dict[tuple[int, ...], float]:
    """The distribution as the paper writes it, pattern by pattern."""
    if toy == "deterministic":
        return {(k, (k + 1) % 10): 1 / 10 for k in DIGITS}
    if toy == "non_uniform":
        return {(k, (k + 1) % 10): (k + 1) / 55 for k in DIGITS}
    if toy == "d1":
        return {(k, (k + 1) % 10, (k + 2) % 10, (k + 3) % 10): 1 / 10 for k in DIGITS}
    if toy == "d2":
        return {(k, (k + 1) % 10, m, (m + 1) % 10): 1 / 100 for k in DIGITS for m in DIGITS}
    if toy == "needle":
        return {tuple((k + j) % 10 for j in (0, 1, 2, 3, 0, 1, 2, 3)): 1 / 10 for k in DIGITS}
    assert dependence is not None
    pairs = {
        (k, m): (dependence if m == (k + 1) % 10 else (1 - dependence) / 9) / 10 for k, m in product(DIGITS, DIGITS)
    }
    return {pair: probability for pair, probability in pairs.items() if probability}


TOYS: list[tuple[PatternToy, float | None]] = [
    *((toy, None) for toy in get_args(PatternToy) if toy != "dependence"),
    *(("dependence", dependence) for dependence in (0.0, 0.3, 0.8, 1.0)),
]


@pytest.mark.parametrize(("toy", "dependence"), TOYS)
def test_the_support_is_the_paper_s_and_the_rows_follow_it(toy: PatternToy, dependence: float | None) -> None:
    expected = joint(toy, dependence)
    patterns, probabilities = support(toy, dependence)
    found = dict(zip(map(tuple, patterns.tolist()), probabilities, strict=True))
    assert found == pytest.approx(expected)
    rows = PatternSource(toy, dependence=dependence, seed=5).gather(np.arange(100_000))["tokens"]
    counts = Counter(map(tuple, rows.tolist()))
    assert set(counts) <= set(expected)
    assert stats.chisquare([counts[p] for p in expected], [1e5 * q for q in expected.values()]).pvalue > 1e-4


@pytest.mark.parametrize("length", [8, 10, 40])
def test_the_haystack_is_uniform_and_knows_nothing_of_the_needle(length: int) -> None:
    rows = PatternSource("needle", length=length, seed=3).gather(np.arange(50_000))["tokens"].numpy()
    assert rows.shape == (50_000, length)
    ends = Counter(map(tuple, np.hstack([rows[:, :4], rows[:, -4:]]).tolist()))
    assert set(ends) == set(joint("needle", None))
    for first, second in combinations([0, 4, length - 5], 2) if length > 8 else []:
        table = np.histogram2d(rows[:, first], rows[:, second], bins=10, range=[[-0.5, 9.5]] * 2)[0]
        assert stats.chisquare(table.ravel()).pvalue > 1e-4


SOURCES = [
    PatternSource("d2", seed=1, num_rows=500),
    PatternSource("needle", length=20, num_rows=500),
    *(PointSource(toy, seed=2, num_rows=500) for toy in get_args(PointToy)),
]


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_a_function_of_seed_and_index(source: PatternSource | PointSource) -> None:
    assert len(source) == 500
    indices = np.random.default_rng(0).permutation(500)
    whole, shuffled = source.gather(np.arange(500)), source.gather(indices)
    assert set(whole) == {"tokens", "maskable", "positions"}
    assert [whole[name].dtype for name in whole] == [torch.int64, torch.bool, torch.int64]
    assert whole["maskable"].all()
    assert torch.equal(whole["positions"], torch.arange(whole["tokens"].shape[1]).repeat(500, 1))
    copy = pickle.dumps(source)
    assert len(copy) < 5_000
    for name in whole:
        assert torch.equal(shuffled[name], whole[name][indices])
        assert torch.equal(pickle.loads(copy).gather(indices[:7])[name], shuffled[name][:7])


def test_seeds_give_unrelated_rows() -> None:
    first, second = (PointSource("circles", seed=seed).gather(np.arange(20_000))["tokens"][:, 0] for seed in (0, 1))
    assert abs(stats.spearmanr(first, second).statistic) < 4 / math.sqrt(20_000)
    assert abs(stats.spearmanr(first[1:], first[:-1]).statistic) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**64 - 1])
def test_words_equal_split_mix_in_python_integers(seed: int) -> None:
    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def word(row: int, number: int) -> int:
        key = mix(row ^ mix(mix(seed % 2**64)))
        return mix((key + number * 0x9E3779B97F4A7C15) % 2**64)

    rows = [0, 1, 99_999, 2**62]
    assert random_bits(seed, np.array(rows), 3).tolist() == [[word(row, number) for number in range(3)] for row in rows]
    drawn = uniform(np.array([0, 2**63, 2**64 - 1], np.uint64))
    assert drawn.tolist() == [0.0, 0.5, 1 - 2.0**-53]


@pytest.mark.parametrize("toy", ["swissroll", "circles"])
def test_points_are_those_of_scikit_learn(toy: PointToy) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    if toy == "swissroll":
        reference = datasets.make_swiss_roll(50_000, noise=0.2, random_state=1)[0][:, [0, 2]]
    else:
        reference = datasets.make_circles(50_000, noise=0.02, factor=0.5, random_state=1)[0]
    ours = points(toy, 1, np.arange(50_000))
    for project in (
        lambda x: x[:, 0],
        lambda x: x[:, 1],
        lambda x: x[:, 0] + x[:, 1],
        lambda x: x[:, 0] - x[:, 1],
        lambda x: np.hypot(x[:, 0], x[:, 1]),
    ):
        assert stats.ks_2samp(project(ours), project(reference)).pvalue > 1e-4


def test_the_checkerboard_is_uniform_on_two_diagonal_quadrants() -> None:
    counts = histogram("checkerboard", 0, 100_000)
    quadrants = [counts[:50, :50], counts[50:, 50:]]
    assert sum(map(np.sum, quadrants)) == 100_000
    assert stats.chisquare(np.stack(quadrants).ravel()).pvalue > 1e-4


@pytest.mark.parametrize("toy", get_args(PointToy))
def test_points_fill_the_bins_of_one_range(toy: PointToy) -> None:
    low, high = np.array(RANGES[toy])
    share = (points(toy, 9, np.arange(100_000)) - low) / (high - low)
    assert np.mean((share < 0) | (share >= 1)) < 2e-4
    assert np.all(share.min(0) < 0.01)
    assert np.all(share.max(0) > 0.99)
    tokens = PointSource(toy, seed=9).gather(np.arange(100_000))["tokens"].numpy()
    assert np.all(np.abs((tokens + 0.5) / 100 - share.clip(0, 1)) <= 0.005 + 1e-9)


def histogram(toy: PointToy, seed: int, num_rows: int) -> Counts:
    tokens = PointSource(toy, seed=seed).gather(np.arange(num_rows))["tokens"].numpy()
    return np.histogram2d(tokens[:, 0], tokens[:, 1], bins=NUM_BINS, range=[[0, NUM_BINS]] * 2)[0]


def entropy(counts: Counts) -> float:
    return float(stats.entropy(counts.ravel()))


@pytest.mark.parametrize(
    ("toy", "whole", "optimum", "floor"),
    [("checkerboard", 8.517, 8.17, 0.051), ("swissroll", 7.08, 6.20, 0.024), ("circles", 7.40, 6.66, 0.030)],
)
def test_entropies_and_floors_are_those_of_the_errata(
    toy: PointToy, whole: float, optimum: float, floor: float
) -> None:
    counts = histogram(toy, 0, 1_000_000)
    h12, h1, h2 = entropy(counts), entropy(counts.sum(1)), entropy(counts.sum(0))
    assert h12 == pytest.approx(whole, abs=0.04)  # which depends on the range, says the page
    assert 1.5 * h12 - (h1 + h2) / 2 == pytest.approx(optimum, abs=0.04)
    p, q = ((counts / counts.sum() + 1e-6).ravel() for counts in (histogram(toy, seed, 100_000) for seed in (1, 2)))
    assert (stats.entropy(p, q) + stats.entropy(q, p)) / 2 == pytest.approx(floor, rel=0.1)


def test_what_a_toy_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown toy 'd3'; legal: deterministic, non_uniform, dependence, d1, d2"):
        PatternSource("d3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown toy 'moons'; legal: checkerboard, swissroll, circles"):
        PointSource("moons")  # type: ignore[arg-type]
    for toy, dependence in (("dependence", None), ("dependence", 1.1), ("dependence", -0.1), ("d1", 0.5), ("d1", 2.0)):
        with pytest.raises(ValueError, match=f"'{toy}' cannot have dependence {dependence}: give .* in \\[0, 1\\]"):
            PatternSource(toy, dependence=dependence)
    with pytest.raises(ValueError, match="'needle' cannot have 7 tokens; set the length to at least 8"):
        PatternSource("needle", length=7)
    with pytest.raises(ValueError, match="'d1' cannot have 5 tokens; set the length to 4, or none"):
        PatternSource("d1", length=5)
