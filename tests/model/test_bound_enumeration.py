"""The likelihood bound of a model of 3 tokens x 4 symbols against its exact likelihood, by enumeration."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.bounds import BoundSums
from model.config import ModelConfig, TransformerConfig
from model.corruption import corrupt_uniform_count
from model.diffusion import MaskedDiffusion, StepSchedule
from model.noise import NoiseKey

LENGTH, SYMBOLS, MASK = 3, 4, 4
SEQUENCES = list(itertools.product(range(SYMBOLS), repeat=LENGTH))
ORDERS = list(itertools.permutations(range(LENGTH)))
CONFIG = ModelConfig(
    backbone=TransformerConfig(dim=16, num_layers=2, num_heads=2), vocab_size=SYMBOLS + 1, mask_id=MASK
)


@pytest.fixture(scope="module")
def model() -> MaskedDiffusion:
    """Random weights, large enough that every position depends on every other."""
    model = MaskedDiffusion(CONFIG).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def nats(model: MaskedDiffusion) -> dict[tuple[int, ...], Tensor]:
    """-log p(every symbol) [3, 4] of all 5^3 partly masked sequences."""
    states = list(itertools.product(range(SYMBOLS + 1), repeat=LENGTH))
    with torch.no_grad():
        hidden = model.denoise(torch.tensor(states))
        scores = (hidden @ model.denoiser.head_weight().T)[..., :SYMBOLS]
    return dict(zip(states, -scores.log_softmax(-1)))


def hide(x: Sequence[int], masked: Sequence[int]) -> tuple[int, ...]:
    return tuple(MASK if position in masked else symbol for position, symbol in enumerate(x))


def cost_of_order(nats: dict[tuple[int, ...], Tensor], x: Sequence[int], order: Sequence[int]) -> float:
    """-log p of revealing x in this order, one position at a time."""
    return sum(nats[hide(x, order[k:])][order[k], x[order[k]]].item() for k in range(LENGTH))


def exact(nats: dict[tuple[int, ...], Tensor], x: Sequence[int]) -> float:
    """-log p(x) of the sampler that reveals a uniformly random masked position at a time."""
    return -math.log(sum(math.exp(-cost_of_order(nats, x, order)) for order in ORDERS) / len(ORDERS))


def enumerated_bound(nats: dict[tuple[int, ...], Tensor], x: Sequence[int]) -> float:
    """Expectation over n uniform on 1..N and subsets of n positions of N / n times the cross-entropies."""
    total = 0.0
    for n in range(1, LENGTH + 1):
        subsets = list(itertools.combinations(range(LENGTH), n))
        for masked in subsets:
            ce = sum(nats[hide(x, masked)][i, x[i]].item() for i in masked)
            total += ce * (LENGTH / n) / (LENGTH * len(subsets))
    return total


def test_the_sampler_is_a_distribution(nats: dict[tuple[int, ...], Tensor]) -> None:
    for order in ORDERS:
        assert sum(math.exp(-cost_of_order(nats, x, order)) for x in SEQUENCES) == pytest.approx(1.0, abs=1e-12)
    assert sum(math.exp(-exact(nats, x)) for x in SEQUENCES) == pytest.approx(1.0, abs=1e-12)


def test_a_simulated_sampler_has_this_distribution(nats: dict[tuple[int, ...], Tensor]) -> None:
    size, generator = 4000, torch.Generator().manual_seed(0)
    counts = dict.fromkeys(SEQUENCES, 0)
    for _ in range(size):
        drawn = [MASK] * LENGTH
        for position in torch.randperm(LENGTH, generator=generator).tolist():
            probabilities = (-nats[tuple(drawn)][position]).exp()
            drawn[position] = int(torch.multinomial(probabilities, 1, generator=generator))
        counts[tuple(drawn)] += 1
    for x, count in counts.items():
        p = math.exp(-exact(nats, x))
        assert abs(count - size * p) < 5 * math.sqrt(size * p * (1 - p)) + 1


def test_the_bound_is_never_below_the_truth(nats: dict[tuple[int, ...], Tensor]) -> None:
    gaps = [enumerated_bound(nats, x) - exact(nats, x) for x in SEQUENCES]
    assert min(gaps) >= -1e-12
    assert max(gaps) > 0.05


def test_the_bound_averages_the_logarithm_over_orders(nats: dict[tuple[int, ...], Tensor]) -> None:
    for x in SEQUENCES:
        costs = [cost_of_order(nats, x, order) for order in ORDERS]
        assert enumerated_bound(nats, x) == pytest.approx(sum(costs) / len(costs), abs=1e-12)


def test_the_estimator_is_unbiased(model: MaskedDiffusion, nats: dict[tuple[int, ...], Tensor]) -> None:
    per_sequence = 600
    tokens_BL = torch.tensor(SEQUENCES).repeat_interleave(per_sequence, 0)
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        document_BL=torch.zeros_like(tokens_BL, dtype=torch.int32),
        positions_BL=torch.arange(LENGTH).expand_as(tokens_BL),
        index_B=torch.arange(len(tokens_BL)),
    )
    with torch.no_grad():
        corruption = corrupt_uniform_count(batch, NoiseKey(0, 0, batch.index_B), CONFIG)
        loss_B = model(batch, corruption, step=StepSchedule()).loss_B
    expected = torch.tensor([enumerated_bound(nats, x) for x in SEQUENCES], dtype=torch.float64)
    estimates = loss_B.view(len(SEQUENCES), per_sequence)
    deviation = (estimates.mean(1) - expected) / (estimates.std(1) / math.sqrt(per_sequence))
    assert deviation.abs().max() < 5
    sums = BoundSums()
    sums.add(loss_B, batch.maskable_BL.sum(1))
    bound = sums.estimate()
    assert bound.tokens == LENGTH * len(tokens_BL)
    assert abs(bound.value - expected.mean().item() / LENGTH) < 5 * bound.error
    assert bound.error < 0.02


def test_the_estimator_gives_every_subset_its_weight(nats: dict[tuple[int, ...], Tensor]) -> None:
    size, x = 5000, (2, 0, 3)
    tokens_BL = torch.tensor(x).expand(size, LENGTH)
    index_B = torch.arange(size)
    batch = Batch(tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool), tokens_BL, index_B)
    corruption = corrupt_uniform_count(batch, NoiseKey(1, 0, index_B), CONFIG)
    real = slice(0, corruption.num_masked)
    weights = torch.zeros(size, LENGTH)
    weights.view(-1)[corruption.rows_M[real]] = corruption.weight_M[real]
    for masked_L, weight_L in zip(corruption.masked_BL, weights):
        assert torch.equal(weight_L, masked_L * (LENGTH / masked_L.sum()))
    states = [tuple(row) for row in corruption.x_t_BL.tolist()]
    assert set(states) == {hide(x, m) for n in (1, 2, 3) for m in itertools.combinations(range(LENGTH), n)}
    average = sum(
        sum(w * nats[state][i, x[i]].item() for i, w in enumerate(row)) for state, row in zip(states, weights.tolist())
    )
    assert average / size == pytest.approx(enumerated_bound(nats, x), rel=0.05)
