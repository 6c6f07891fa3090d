"""The forward process: schedules by finite differences, masks by counting, bounds by enumeration and quadrature."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import integrate
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig, ScheduleConfig, TransformerConfig
from model.corruption import ROW_MULTIPLE, Corruption, MaskSchedule, corrupt, corrupt_uniform_count
from model.noise import NoiseKey

SCHEDULES = (
    ScheduleConfig(kind="linear"),
    ScheduleConfig(kind="cosine"),
    ScheduleConfig(kind="polynomial", power=2.0),
    ScheduleConfig(kind="polynomial", power=0.7),
    ScheduleConfig(kind="geometric"),
    ScheduleConfig(kind="geometric", beta_min=1e-3, beta_max=5.0),
)
MASK = 11


def settings(schedule: ScheduleConfig = SCHEDULES[0], **changes: object) -> ModelConfig:
    config = ModelConfig(backbone=TransformerConfig(), vocab_size=12, mask_id=MASK, schedule=schedule)
    return replace(config, **changes)  # type: ignore[arg-type]


def batch_of(maskable_BL: Tensor, first: int = 0) -> Batch:
    num_sequences, length = maskable_BL.shape
    tokens_BL = torch.randint(0, MASK, maskable_BL.shape, generator=torch.Generator().manual_seed(first))
    return Batch(
        tokens_BL=tokens_BL,
        maskable_BL=maskable_BL,
        document_BL=torch.zeros(num_sequences, length, dtype=torch.int32),
        positions_BL=torch.arange(length).expand(num_sequences, length),
        index_B=torch.arange(first, first + num_sequences),
    )


def random_batch(num_sequences: int, length: int, fraction: float = 0.7) -> Batch:
    draws = torch.rand(num_sequences, length, generator=torch.Generator().manual_seed(7))
    return batch_of(draws < fraction)


def key_of(batch: Batch, step: int = 0) -> NoiseKey:
    return NoiseKey(0, step, batch.index_B)


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_weight_is_minus_the_logarithmic_derivative(config: ScheduleConfig) -> None:
    schedule = MaskSchedule(config)
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    step = 1e-5
    slope = (schedule.alpha(t + step) - schedule.alpha(t - step)) / (2 * step)
    expected = -slope / (1.0 - schedule.alpha(t))
    assert torch.allclose(schedule.weight(t), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_alpha_falls_and_time_inverts_it(config: ScheduleConfig) -> None:
    schedule = MaskSchedule(config)
    t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha.dtype == torch.float64
    assert alpha.diff().max() < 0
    assert alpha[0].item() == pytest.approx(math.exp(-config.beta_min) if config.kind == "geometric" else 1.0)
    assert alpha[-1].item() == pytest.approx(math.exp(-config.beta_max) if config.kind == "geometric" else 0.0)
    assert torch.allclose(schedule.time(alpha), t, atol=1e-7)


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_positions_are_masked_with_probability_one_minus_alpha(config: ScheduleConfig) -> None:
    batch = batch_of(torch.ones(500, 400, dtype=torch.bool))
    corruption = corrupt(batch, key_of(batch), settings(config))
    hidden_B = 1.0 - MaskSchedule(config).alpha(corruption.t_BS[:, 0])
    deviation_B = (corruption.masked_BL.double().mean(1) - hidden_B) / (hidden_B * (1 - hidden_B) / 400 + 1e-9).sqrt()
    assert deviation_B.abs().max() < 6
    assert abs(deviation_B.mean()) < 5 / math.sqrt(500)
    assert abs(deviation_B[hidden_B > 0.05].std() - 1) < 0.25
    per_position_L = corruption.masked_BL.double().mean(0) - hidden_B.mean()
    assert per_position_L.abs().max() < 5 * math.sqrt(0.25 / 500)


def test_times_fill_a_clipped_interval() -> None:
    batch = batch_of(torch.ones(1000, 1, dtype=torch.bool))
    t_B = corrupt(batch, key_of(batch), settings(ScheduleConfig(t_min=0.45, t_max=0.95))).t_BS[:, 0]
    assert torch.allclose(t_B.sort().values, 0.45 + 0.5 * (torch.arange(1000) + 0.5).double() / 1000, atol=1e-3)


def test_times_fill_the_interval_above_t_min() -> None:
    batch = batch_of(torch.ones(1000, 1, dtype=torch.bool))
    t_B = corrupt(batch, key_of(batch), settings(ScheduleConfig(t_min=0.25))).t_BS[:, 0]
    assert t_B.min() > 0.25
    assert t_B.max() < 1
    assert torch.allclose(t_B.sort().values, 0.25 + 0.75 * (torch.arange(1000) + 0.5).double() / 1000, atol=2e-3)


def check_against_a_loop(batch: Batch, corruption: Corruption, weight_B: list[float]) -> None:
    rows, targets, weights = [], [], []
    num_sequences, length = batch.tokens_BL.shape
    for b, position in itertools.product(range(num_sequences), range(length)):
        clean = batch.tokens_BL[b, position].item()
        if corruption.masked_BL[b, position]:
            assert batch.maskable_BL[b, position]
            assert corruption.x_t_BL[b, position] == MASK
            rows.append(b * length + position)
            targets.append(clean)
            weights.append(weight_B[b])
        else:
            assert corruption.x_t_BL[b, position] == clean
    real = slice(0, len(rows))
    assert corruption.num_masked == len(rows)
    assert corruption.num_maskable == sum(batch.maskable_BL.flatten().tolist())
    assert corruption.rows_M[real].tolist() == rows
    assert corruption.targets_M[real].tolist() == targets
    assert torch.allclose(corruption.weight_M[real], torch.tensor(weights), rtol=1e-6)
    padded = len(corruption.rows_M)
    assert padded % ROW_MULTIPLE == 0
    assert 0 < padded < len(rows) + ROW_MULTIPLE + (not rows)
    assert len(corruption.targets_M) == len(corruption.weight_M) == padded
    assert not corruption.weight_M[len(rows) :].any()
    assert not corruption.rows_M[len(rows) :].any()


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_corrupt_agrees_with_a_plain_loop(config: ScheduleConfig) -> None:
    batch = random_batch(9, 31)
    corruption = corrupt(batch, key_of(batch), settings(config))
    weight_B = MaskSchedule(config).weight(corruption.t_BS[:, 0]).tolist()
    check_against_a_loop(batch, corruption, weight_B)
    uniform = corrupt(batch, key_of(batch), settings(config, loss_weight="uniform"))
    check_against_a_loop(batch, uniform, [1.0] * 9)
    assert torch.equal(uniform.x_t_BL, corruption.x_t_BL)


@pytest.mark.parametrize(
    ("power", "weight", "rare"), [(0.3, "elbo", True), (1.0, "elbo", False), (0.3, "uniform", False)]
)
def test_a_tenth_of_times_makes_up_most_of_a_bound_whose_power_is_low(power: float, weight: str, rare: bool) -> None:
    batch = batch_of(torch.ones(4000, 16, dtype=torch.bool))
    schedule = ScheduleConfig(kind="polynomial", power=power)
    corruption = corrupt(batch, key_of(batch), settings(schedule, loss_weight=weight))
    loss_B = torch.zeros(4000).index_add_(0, corruption.rows_M // 16, corruption.weight_M)
    early_B = corruption.t_BS[:, 0] < 0.1
    assert (loss_B[early_B].square().sum() > 0.5 * loss_B.square().sum()) == rare


def test_the_divisor_is_the_count_that_was_asked_for() -> None:
    batch = random_batch(9, 31)
    for name in ("maskable", "masked"):
        corruption = corrupt(batch, key_of(batch), settings(normalize_by=name))
        assert corruption.divisor == getattr(corruption, f"num_{name}")
    assert corruption.num_masked != corruption.num_maskable
    counted = corrupt_uniform_count(batch, key_of(batch), settings(normalize_by="masked"))
    assert counted.divisor == counted.num_maskable


@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
def test_nothing_to_mask_gives_padding_only(function) -> None:  # type: ignore[no-untyped-def]
    batch = batch_of(torch.zeros(3, 8, dtype=torch.bool))
    corruption = function(batch, key_of(batch), settings())
    check_against_a_loop(batch, corruption, [0.0] * 3)
    assert len(corruption.rows_M) == ROW_MULTIPLE
    assert corruption.t_BS[:, 0].isfinite().all()


@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_are_corrupted_as_the_whole(function, size: int) -> None:  # type: ignore[no-untyped-def]
    batch = random_batch(12, 40)
    key = key_of(batch, step=3)
    whole = function(batch, key, settings())
    starts = range(0, 12, size)
    parts = [function(batch.rows(s, s + size), key.rows(s, s + size), settings()) for s in starts]
    assert torch.equal(torch.cat([part.x_t_BL for part in parts]), whole.x_t_BL)
    assert torch.equal(torch.cat([part.t_BS[:, 0] for part in parts]), whole.t_BS[:, 0])
    rows = [part.rows_M[: part.num_masked] + 40 * s for part, s in zip(parts, starts)]
    assert torch.equal(torch.cat(rows), whole.rows_M[: whole.num_masked])
    weights = [part.weight_M[: part.num_masked] for part in parts]
    assert torch.equal(torch.cat(weights), whole.weight_M[: whole.num_masked])
    assert sum(part.divisor for part in parts) == whole.divisor
    order = torch.tensor([7, 0, 11, 3])
    picked = Batch.of(
        {name.removesuffix("_BL").removesuffix("_B"): v[order] for name, v in vars(batch).items() if v is not None}
    )
    assert torch.equal(function(picked, key_of(picked, step=3), settings()).x_t_BL, whole.x_t_BL[order])


def test_uniform_count_agrees_with_a_plain_loop() -> None:
    batch = random_batch(9, 31)
    corruption = corrupt_uniform_count(batch, key_of(batch), settings())
    total_B, count_B = batch.maskable_BL.sum(1), corruption.masked_BL.sum(1)
    assert count_B.min() >= 1
    check_against_a_loop(batch, corruption, (total_B / count_B).tolist())


def test_uniform_count_is_uniform_and_so_is_the_subset() -> None:
    size = 30_000
    batch = batch_of(torch.tensor([True, False, True, True]).expand(size, 4))
    masked_BL = corrupt_uniform_count(batch, key_of(batch), settings()).masked_BL
    subsets = Counter(tuple(row) for row in masked_BL.tolist())
    for subset in itertools.product((False, True), repeat=3):
        n = sum(subset)
        probability = 1 / 3 / math.comb(3, n) if n else 0.0
        found = subsets.pop((subset[0], False, *subset[1:]), 0)
        assert abs(found - size * probability) <= 5 * math.sqrt(size * probability * (1 - probability))
    assert not subsets


def test_the_noise_level_given_the_count_is_beta() -> None:
    size, total = 20_000, 4
    batch = batch_of(torch.ones(size, total, dtype=torch.bool))
    for config in (SCHEDULES[0], SCHEDULES[1]):
        corruption = corrupt_uniform_count(batch, key_of(batch), settings(config))
        hidden_B = 1.0 - MaskSchedule(config).alpha(corruption.t_BS[:, 0])
        count_B = corruption.masked_BL.sum(1)
        for n in range(1, total + 1):
            for first in (True, False):
                chosen = hidden_B[(count_B == n) & (corruption.masked_BL[:, 0] == first)]
                if not len(chosen):
                    assert (n, first) == (total, False)
                    continue
                mean, a, b = n / (total + 1), n, total - n + 1
                variance = a * b / ((a + b) ** 2 * (a + b + 1))
                assert abs(chosen.mean() - mean) < 5 * math.sqrt(variance / len(chosen))
                assert chosen.var().item() == pytest.approx(variance, rel=0.15)


def toy(masked_BL: Tensor) -> Tensor:
    """An arbitrary number of each set of 4 positions, zero for the empty one."""
    number = (masked_BL.long() * torch.tensor([1, 2, 4, 8])).sum(1)
    return torch.tensor([0.0, *(math.sin(3 * k) + 1.5 for k in range(1, 16))], dtype=torch.float64)[number]


def integral(config: ScheduleConfig) -> float:
    """The bound's integral of w(t) E[toy] over t in [0, 1]."""
    subsets = torch.tensor(list(itertools.product((False, True), repeat=4)))
    count, value = subsets.sum(1), toy(subsets)
    schedule = MaskSchedule(config)

    def integrand(t: float) -> float:
        time = torch.tensor(t, dtype=torch.float64)
        alpha = schedule.alpha(time)
        return (schedule.weight(time) * ((1 - alpha) ** count * alpha ** (4 - count) * value).sum()).item()

    return integrate.quad(integrand, 1e-9, 1.0, epsabs=1e-9, epsrel=1e-9, limit=200)[0]


def enumerated() -> float:
    """The same expectation by counts: n uniform, a random subset of n, weight N / n."""
    subsets = torch.tensor(list(itertools.product((False, True), repeat=4))[1:])
    count = subsets.sum(1)
    share = torch.tensor([1 / math.comb(4, n) / n for n in count.tolist()], dtype=torch.float64)
    return (share * toy(subsets)).sum().item()


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_counting_is_the_integral_over_time_for_every_schedule(config: ScheduleConfig) -> None:
    # The geometric schedule starts at 1 - exp(-beta_min) and ends at 1 - exp(-beta_max): not quite at 0 and 1.
    slack = 1e-2 if config.beta_max < 20 else 2e-4 if config.kind == "geometric" else 1e-6
    assert integral(config) == pytest.approx(enumerated(), rel=slack)


@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_weighted_averages_estimate_the_bound(function, kind) -> None:  # type: ignore[no-untyped-def]
    size = 60_000
    batch = batch_of(torch.ones(size, 4, dtype=torch.bool))
    corruption = function(batch, key_of(batch), settings(ScheduleConfig(kind=kind, t_min=1e-6)))
    sequence = corruption.rows_M[: corruption.num_masked] // 4
    weight_B = torch.zeros(size, dtype=torch.float64)
    weight_B[sequence] = corruption.weight_M[: corruption.num_masked].double()
    estimates = weight_B * toy(corruption.masked_BL)
    assert abs(estimates.mean().item() - enumerated()) < 5 * (estimates.std() / math.sqrt(size)).item()


@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
@pytest.mark.parametrize("changes", [{}, {"block_size": 8}, {"autoregressive": True}], ids=str)
def test_rows_of_a_corruption_are_the_corruption_of_the_rows(function, changes: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    batch = random_batch(12, 40)
    key, config = key_of(batch, step=3), settings(**changes)
    whole = function(batch, key, config)
    for start, stop in ((0, 5), (5, 12), (11, 12), (0, 12)):
        part, alone = whole.rows(start, stop), function(batch.rows(start, stop), key.rows(start, stop), config)
        for name, value in vars(alone).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(part, name), value), name
        assert (part.num_masked, part.divisor) == (alone.num_masked, alone.divisor)
        assert torch.equal(part.key.index_B, alone.key.index_B)


BLOCKS, BLOCK = 5, 8


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_each_block_has_a_time_and_a_weight_of_its_own(config: ScheduleConfig) -> None:
    """A plain loop: block b of a row is masked as a row of its own would be, at its own time."""
    batch = random_batch(9, BLOCKS * BLOCK)
    corruption = corrupt(batch, key_of(batch), settings(config, block_size=BLOCK))
    assert corruption.t_BS.shape == corruption.weight_BS.shape == (9, BLOCKS)
    assert corruption.num_segments == BLOCKS
    assert torch.allclose(corruption.weight_BS, MaskSchedule(config).weight(corruption.t_BS).float())
    weights = []
    for b, position in corruption.masked_BL.nonzero().tolist():
        weights.append(corruption.weight_BS[b, position // BLOCK].item())
    real = slice(0, corruption.num_masked)
    assert corruption.weight_M[real].tolist() == weights
    positions_M = corruption.rows_M[real] % (BLOCKS * BLOCK)
    assert torch.equal(corruption.segment_of(corruption.rows_M[real]), positions_M // BLOCK)
    hidden = [[bool(row[s * BLOCK : s * BLOCK + BLOCK].any()) for s in range(BLOCKS)] for row in corruption.masked_BL]
    assert corruption.hidden_BS.tolist() == hidden


def test_blocks_are_masked_at_their_own_rates() -> None:
    config = settings(ScheduleConfig(t_min=0.05, t_max=0.95), block_size=400)
    batch = batch_of(torch.ones(300, 1200, dtype=torch.bool))
    corruption = corrupt(batch, key_of(batch), config)
    share_BS = corruption.masked_BL.view(300, 3, 400).double().mean(2)
    deviation_BS = (share_BS - corruption.t_BS) / (corruption.t_BS * (1 - corruption.t_BS) / 400).sqrt()
    assert deviation_BS.abs().max() < 6
    assert abs(deviation_BS.std().item() - 1) < 0.1
    for s in range(3):
        expected = 0.05 + 0.9 * (torch.arange(300) + 0.5).double() / 300
        assert torch.allclose(corruption.t_BS[:, s].sort().values, expected, atol=6e-3)


def test_one_block_is_the_whole_sequence() -> None:
    batch = random_batch(9, 32)
    for function in (corrupt, corrupt_uniform_count):
        whole, block = (function(batch, key_of(batch), settings(block_size=size)) for size in (0, 32))
        for name, value in vars(whole).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(block, name), value), name


def test_counts_are_uniform_in_every_block() -> None:
    """Between the blocks of one step they are not independent: segments of stratified draws differ by a shift."""
    size = 30_000
    maskable = [True, False, True, True, True, True, False, False, False, False]
    batch = batch_of(torch.tensor(maskable).expand(size, 10))
    corruption = corrupt_uniform_count(batch, key_of(batch), settings(block_size=2))
    count_BS = corruption.masked_BL.view(size, 5, 2).sum(2)
    assert count_BS[:, 0].unique().tolist() == [1]
    assert count_BS[:, 3:].unique().tolist() == [0]
    for block in (1, 2):
        assert abs(int((count_BS[:, block] == 1).sum()) - size / 2) < 5 * math.sqrt(size / 4)
    first_B = corruption.masked_BL[count_BS[:, 1] == 1, 2]
    assert abs(first_B.double().mean() - 0.5) < 5 / math.sqrt(4 * len(first_B))
    expected_BS = torch.tensor([1, 2, 2, 0, 0]) / count_BS.clamp(min=1)
    assert torch.equal(corruption.weight_BS, expected_BS.float())
    assert corruption.t_BS.isfinite().all()


def test_a_sum_over_blocks_estimates_the_sum_of_their_bounds() -> None:
    """Blocks of the toy function of 4 positions, each with the same expectation."""
    size = 40_000
    batch = batch_of(torch.ones(size, 8, dtype=torch.bool))
    for function in (corrupt, corrupt_uniform_count):
        config = settings(ScheduleConfig(kind="cosine", t_min=1e-6), block_size=4)
        corruption = function(batch, key_of(batch), config)
        value_BS = torch.stack([toy(corruption.masked_BL[:, s * 4 : s * 4 + 4]) for s in range(2)], 1)
        estimates = (corruption.weight_BS.double() * value_BS).sum(1)
        assert abs(estimates.mean().item() - 2 * enumerated()) < 5 * (estimates.std() / math.sqrt(size)).item()


@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_of_blocks_are_corrupted_as_the_whole(function, size: int) -> None:  # type: ignore[no-untyped-def]
    batch, config = random_batch(10, 40), settings(block_size=8)
    key = key_of(batch, step=3)
    whole = function(batch, key, config)
    parts = [function(batch.rows(s, s + size), key.rows(s, s + size), config) for s in range(0, 10, size)]
    for name in ("x_t_BL", "t_BS", "weight_BS"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_next_token_prediction_counts_every_maskable_position_once() -> None:
    batch = random_batch(6, 20)
    for function in (corrupt, corrupt_uniform_count):
        for weight in ("elbo", "uniform"):
            corruption = function(batch, key_of(batch), settings(autoregressive=True, loss_weight=weight))
            assert torch.equal(corruption.masked_BL, batch.maskable_BL)
            assert corruption.num_masked == corruption.num_maskable == corruption.divisor
            real = slice(0, corruption.num_masked)
            assert corruption.weight_M[real].unique().tolist() == [1.0]
            assert torch.equal(corruption.targets_M[real], batch.tokens_BL[batch.maskable_BL])
            assert torch.equal(corruption.x_t_BL[:, 1:], batch.tokens_BL[:, :-1])
            assert (corruption.x_t_BL[:, 0] == MASK).all()
