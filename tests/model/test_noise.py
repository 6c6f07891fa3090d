"""Counter-based noise against plain Python integers, and the statistics of its draws."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from model.noise import NoiseKey, Stream, normal_at, stream_key

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MODULUS = 1 << 64
PINNED_SEGMENTS = [0.7001460210481795, 0.8705558442111939, 0.07408574375257049]
PINNED_NORMALS = [0.1447603553533554, 0.46570175886154175, 0.6749438643455505, -0.32798752188682556]


def split_mix(state: int, count: int) -> list[int]:
    """The published generator: `count` outputs after `state`."""
    outputs = []
    for _ in range(count):
        state = (state + GOLDEN) % MODULUS
        z = state
        z = (z ^ (z >> 30)) * MULTIPLIERS[0] % MODULUS
        z = (z ^ (z >> 27)) * MULTIPLIERS[1] % MODULUS
        outputs.append(z ^ (z >> 31))
    return outputs


def state_before(output: int) -> int:
    """Runs the generator backwards: the state whose next output is this one."""

    def unshift(z: int, count: int) -> int:
        x = z
        for _ in range(64 // count + 1):
            x = z ^ (x >> count)
        return x

    z = unshift(output, 31)
    z = unshift(z * pow(MULTIPLIERS[1], -1, MODULUS) % MODULUS, 27)
    z = unshift(z * pow(MULTIPLIERS[0], -1, MODULUS) % MODULUS, 30)
    return (z - GOLDEN) % MODULUS


def signed(values: list[int]) -> Tensor:
    return torch.tensor([v - MODULUS if v >= MODULUS // 2 else v for v in values])


def key(num_sequences: int = 8, *, seed: int = 3, step: int = 5, first: int = 0) -> NoiseKey:
    return NoiseKey(seed, step, torch.arange(first, first + num_sequences))


def test_bits_are_split_mix_64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert split_mix(1234567, 5) == published
    states = [1234567, 0, 1, MODULUS - 1, MODULUS // 2, 0xDEADBEEFCAFEF00D]
    found = Stream(signed(states)).bits(4, 25)
    assert found.shape == (6, 4, 25)
    for row, state in enumerate(states):
        assert torch.equal(found[row].flatten(), signed(split_mix(state, 100)))


def test_the_extreme_bits_give_neither_zero_nor_one() -> None:
    extremes = [0, 1, MODULUS - 1, MODULUS - 2, MODULUS // 2]
    stream = Stream(signed([state_before(bits) for bits in extremes]))
    assert torch.equal(stream.bits(1)[:, 0], signed(extremes))
    draws = stream.uniform(1)
    assert draws.min() > 0
    assert draws.max() < 1
    assert stream.gumbel(1).isfinite().all()


@pytest.mark.parametrize("step", [0, 1, 10**9])
def test_a_split_batch_draws_the_same_bits(step: int) -> None:
    whole = key(12, step=step, first=2**40)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    probability = torch.rand(12, 7)
    for name in ("mask", "dropout"):
        bits, below = whole.stream(name).bits(3, 5), whole.stream(name).below(probability)
        for size in (1, 5, 12):
            parts = [whole.rows(start, min(12, start + size)) for start in range(0, 12, size)]
            assert torch.equal(torch.cat([part.stream(name).bits(3, 5) for part in parts]), bits)
            assert torch.equal(torch.cat([part.stratified()[:, 0] for part in parts]), whole.stratified()[:, 0])
        shuffled = NoiseKey(whole.seed, step, whole.index_B[order])
        assert torch.equal(shuffled.stream(name).bits(3, 5), bits[order])
        assert torch.equal(shuffled.stream(name).fold(4).bits(2), whole.stream(name).fold(4).bits(2)[order])
        assert torch.equal(shuffled.stream(name).below(probability[order]), below[order])


def test_a_longer_row_begins_with_the_shorter_one() -> None:
    stream = key().stream("mask")
    assert torch.equal(stream.bits(100)[:, :37], stream.bits(37))


def test_anything_in_the_key_gives_an_uncorrelated_stream() -> None:
    count = 4000
    base = key(8)
    others = {
        "same": base.stream("mask").fold(0),
        "fold": base.stream("mask").fold(1),
        "name": base.stream("subset"),
        "seed": key(8, seed=4).stream("mask"),
        "step": key(8, step=6).stream("mask"),
        "negative seed": key(8, seed=-3).stream("mask"),
        "row": NoiseKey(3, 5, base.index_B + 8).stream("mask"),
        "far row": NoiseKey(3, 5, base.index_B + 2**33).stream("mask"),
        "swapped": NoiseKey(5, 3, base.index_B).stream("mask"),
    }
    draws = torch.cat([base.stream("mask").uniform(count)] + [s.uniform(count) for s in others.values()])
    correlation = torch.corrcoef(draws).fill_diagonal_(0.0)
    assert correlation.abs().max() < 6 / math.sqrt(count)
    bits = torch.cat([base.stream("mask").bits(count)] + [s.bits(count) for s in others.values()])
    assert bits.unique().numel() == bits.numel()


def test_uniform_is_uniform_along_rows_and_across_them() -> None:
    along = key(1).stream("mask").uniform(200_000)[0]
    across = key(200_000).stream("mask").uniform(1)[:, 0]
    across_steps = torch.cat([key(1, step=step).stream("mask").uniform(1)[0] for step in range(2000)])
    for draws in (along, across, across_steps):
        assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-4
    for draws in (along, across):
        lag = torch.corrcoef(torch.stack((draws[1:], draws[:-1])))[0, 1]
        assert abs(lag) < 5 / math.sqrt(200_000)


def test_every_bit_of_the_output_is_fair() -> None:
    bits = key(64).stream("mask").bits(2000).flatten()
    for place in range(64):
        ones = int((bits >> place & 1).sum())
        assert abs(ones - bits.numel() / 2) < 5 * math.sqrt(bits.numel()) / 2


def test_below_happens_as_often_as_asked() -> None:
    count = 200_000
    for probability in (1e-4, 0.01, 0.3, 0.5, 0.9, 0.9999):
        hits = int(key(2).stream("mask").below(torch.full((2, count), probability)).sum())
        assert abs(hits - 2 * count * probability) < 5 * math.sqrt(2 * count * probability * (1 - probability))
    assert not key(2).stream("mask").below(torch.zeros(2, count)).any()
    assert key(2).stream("mask").below(torch.ones(2, count)).all()


def test_below_ignores_the_last_bits_of_a_probability() -> None:
    probability = torch.rand(16, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stream = key(16).stream("mask")
    assert torch.equal(stream.below(probability), stream.below(probability * (1 + 1e-15)))


def test_gumbel_has_its_moments_and_draws_categories() -> None:
    draws = key(4).stream("token").gumbel(50_000)
    assert draws.mean().item() == pytest.approx(np.euler_gamma, abs=0.015)
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    chosen = (key(1).stream("token").gumbel(100_000, 4)[0] + probabilities.log()).argmax(1)
    assert stats.chisquare(torch.bincount(chosen).numpy(), 100_000 * probabilities.numpy()).pvalue > 1e-4


def test_normal_draws_are_normal_and_uncorrelated() -> None:
    draws = normal_at(stream_key(1, "initial/a"), torch.arange(200_000))
    other = normal_at(stream_key(1, "initial/b"), torch.arange(200_000))
    assert stats.kstest(draws.double().numpy(), "norm").pvalue > 1e-4
    pairs = torch.stack((draws[:-1], draws[1:], other[:-1], draws[:-1] ** 2, draws[1:] ** 2))
    correlation = torch.corrcoef(pairs)
    for one, two in ((0, 1), (0, 2), (3, 4)):
        assert abs(correlation[one, two]) < 5 / math.sqrt(200_000)


def test_a_tensor_drawn_in_pieces_is_the_whole() -> None:
    index = torch.arange(6 * 35).view(6, 35)
    whole = normal_at(stream_key(9, "w"), index)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat([normal_at(stream_key(9, "w"), piece) for piece in index.split(4)]), whole)
    assert torch.equal(torch.cat([normal_at(stream_key(9, "w"), p) for p in index.split(10, 1)], 1), whole)


def test_stratified_is_the_exact_fraction() -> None:
    index = [0, 1, 2, 1000, 2**40 + 17, 2**62]
    found = NoiseKey(3, 5, torch.tensor(index)).stratified()[:, 0]
    start = Fraction(found[0].item())
    for draw, j in zip(found.tolist(), index):
        exact = (start + j * Fraction(GOLDEN, MODULUS)) % 1
        assert abs(Fraction(draw) - exact) < Fraction(1, 2**51)
    assert abs(Fraction(GOLDEN, MODULUS) - Fraction((math.sqrt(5) - 1) / 2)) < Fraction(1, 2**52)


def test_stratified_starts_anew_each_step_and_name() -> None:
    starts = torch.stack([key(1, step=step).stratified()[0, 0] for step in range(3000)])
    assert stats.kstest(starts.numpy(), "uniform").pvalue > 1e-4
    assert abs(torch.corrcoef(torch.stack((starts[1:], starts[:-1])))[0, 1]) < 5 / math.sqrt(3000)
    assert key(1).stratified("time") != key(1).stratified("count")


@pytest.mark.parametrize("first", [0, 12_345, 2**35])
def test_every_contiguous_slice_is_stratified(first: int) -> None:
    whole = key(2000, first=first).stratified()[:, 0]
    for start, count in ((0, 1), (7, 2), (100, 8), (3, 64), (500, 100), (999, 1000)):
        slice_ = whole[start : start + count].sort().values
        gaps = torch.cat((slice_.diff(), (slice_[:1] + 1 - slice_[-1:])))
        assert gaps.max() * count < 2.0
        assert gaps.min() * count > 0.35
        ranks = torch.arange(count) + 0.5
        assert (slice_ * count - ranks).abs().max() < 2.0


def test_the_numbers_stay_what_they_are() -> None:
    """Runs resume with these numbers: changing them breaks every resumed run."""
    pinned = NoiseKey(0, 0, torch.tensor([0, 1, 2**40]))
    assert pinned.stream("mask").bits(1)[:, 0].tolist() == [
        976778157937734227,
        832507444549321124,
        -5093724147802378546,
    ]
    assert pinned.stratified()[:, 0].tolist() == [0.4091901795068892, 0.027224168256784087, 0.7001460210481795]
    assert NoiseKey(-1, 7, torch.tensor([3])).stream("dropout").fold(2).bits(1).item() == -2998436879944807137


def test_normal_draws_of_a_stream_are_normal() -> None:
    along = key(1).stream("latent").normal(200_001)[0]
    across = key(50_000).stream("latent").normal(3)
    assert (along.dtype, along.shape, across.shape) == (torch.float32, (200_001,), (50_000, 3))
    for draws in (along, across.flatten(), across[:, 2]):
        assert stats.kstest(draws.double().numpy(), "norm").pvalue > 1e-4
    pairs = torch.stack((along[0:200_000:2], along[1:200_000:2], along[0:200_000:2] ** 2, along[1:200_000:2] ** 2))
    for one, two in ((0, 1), (2, 3)):  # the two halves of one word
        assert abs(torch.corrcoef(pairs)[one, two]) < 5 / math.sqrt(100_000)
    assert abs(torch.corrcoef(torch.stack((along[1:-1:2], along[2::2])))[0, 1]) < 5 / math.sqrt(100_000)
    assert torch.corrcoef(across.T).fill_diagonal_(0.0).abs().max() < 5 / math.sqrt(50_000)


def test_normal_draws_are_box_muller_of_the_two_halves_of_a_word() -> None:
    words = split_mix(77, 3)
    found = Stream(signed([77])).normal(5)[0].tolist()
    for n, value in enumerate(found):
        first, second = ((half + 0.5) / 2**32 for half in (words[n // 2] >> 32, words[n // 2] % 2**32))
        turn = (math.cos, math.sin)[n % 2](2 * math.pi * second)
        assert value == pytest.approx(math.sqrt(-2 * math.log(first)) * turn, abs=2e-6)


def test_normal_draws_at_the_extremes_are_finite() -> None:
    extremes = [0, 1, MODULUS - 1, (1 << 32) - 1, MODULUS - (1 << 32)]
    draws = Stream(signed([state_before(bits) for bits in extremes])).normal(2)
    assert draws.isfinite().all()
    assert draws.abs().max() > 6.5


@pytest.mark.parametrize("size", [1, 5, 12])
def test_normal_draws_do_not_depend_on_the_batch(size: int) -> None:
    whole = key(12, first=2**40)
    draws = whole.stream("hint").normal(3, 5)
    parts = [whole.rows(start, start + size).stream("hint").normal(3, 5) for start in range(0, 12, size)]
    assert torch.equal(torch.cat(parts), draws)
    longer = whole.stream("hint").normal(40)
    assert torch.equal(longer[:, :15], draws.flatten(1))


def test_streams_at_places_are_the_folds_of_their_sequences() -> None:
    stream = key(6).stream("hint")
    sequence_M, number_M = torch.tensor([0, 0, 5, 3, 3]), torch.tensor([0, 7, 7, 0, 1000])
    found = stream.at(sequence_M, number_M).bits(4)
    for row, b, number in zip(found, sequence_M.tolist(), number_M.tolist()):
        assert torch.equal(row, stream.fold(number).bits(4)[b])
    assert found.unique().numel() == found.numel()
    empty = torch.zeros(0, dtype=torch.int64)
    assert stream.at(empty, empty).normal(3, 2).shape == (0, 3, 2)


def test_places_are_independent_of_each_other() -> None:
    places = torch.zeros(20, dtype=torch.int64), torch.arange(20)
    draws = key(1).stream("hint").at(*places).uniform(4000)
    assert torch.corrcoef(draws).fill_diagonal_(0.0).abs().max() < 6 / math.sqrt(4000)


@pytest.mark.parametrize("first", [0, 2**35])
def test_every_segment_is_stratified_with_a_shift_of_its_own(first: int) -> None:
    whole = key(2000, first=first).stratified(num_segments=5)
    assert whole.shape == (2000, 5)
    assert torch.equal(whole[:, :1], key(2000, first=first).stratified())
    for segment in range(5):
        for start, count in ((7, 2), (100, 8), (500, 100), (999, 1000)):
            slice_ = whole[start : start + count, segment].sort().values
            assert (slice_ * count - torch.arange(count) - 0.5).abs().max() < 2.0
    shift_BS = (whole - whole[:, :1]) % 1.0
    assert (shift_BS - shift_BS[:1]).abs().max() < 1e-12  # h(step, block), whatever the sample
    assert shift_BS[0].unique().numel() == 5
    assert torch.equal(key(2000, first=first).stratified(num_segments=3), whole[:, :3])


def test_shifts_of_segments_are_uniform_and_independent_over_steps() -> None:
    starts = torch.cat([key(1, step=step).stratified(num_segments=4) for step in range(3000)])
    for segment in range(4):
        assert stats.kstest(starts[:, segment].numpy(), "uniform").pvalue > 1e-4
    assert torch.corrcoef(starts.T).fill_diagonal_(0.0).abs().max() < 5 / math.sqrt(3000)


def test_the_newer_numbers_stay_what_they_are_too() -> None:
    pinned = NoiseKey(0, 0, torch.tensor([0, 2**40]))
    assert pinned.stratified(num_segments=3)[1].tolist() == PINNED_SEGMENTS
    assert pinned.stream("latent").normal(2).flatten().tolist() == pytest.approx(PINNED_NORMALS, abs=1e-6)
