"""Bound sums: the ratio, and its error against simulation and a bootstrap."""

import math

import pytest
import torch
from torch import Tensor

from model.bounds import BoundSums


def population(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Losses that grow with the number of tokens, which varies much between sequences."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (size,), generator=generator)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return tokens * (2.0 + 0.05 * tokens) + noise.exp() * tokens.sqrt(), tokens


def sums_of(loss: Tensor, tokens: Tensor) -> BoundSums:
    sums = BoundSums()
    sums.add(loss, tokens)
    return sums


def test_the_ratio_is_total_loss_over_total_tokens() -> None:
    loss, tokens = population(100, 0)
    bound = sums_of(loss, tokens).estimate()
    assert bound.value == pytest.approx(sum(loss.tolist()) / sum(tokens.tolist()), rel=1e-14)
    assert bound.tokens == sum(tokens.tolist())


def test_the_error_is_the_spread_over_repeated_draws() -> None:
    repeats, size = 2000, 200
    bounds = [sums_of(*population(size, seed)).estimate() for seed in range(repeats)]
    ratios = torch.tensor([bound.value for bound in bounds], dtype=torch.float64)
    errors = torch.tensor([bound.error for bound in bounds], dtype=torch.float64)
    assert errors.mean().item() == pytest.approx(ratios.std().item(), rel=0.06)
    covered = ((ratios - ratios.mean()).abs() < 1.96 * errors).double().mean().item()
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_error_is_a_bootstraps() -> None:
    loss, tokens = population(300, 1)
    picks = torch.randint(0, 300, (4000, 300), generator=torch.Generator().manual_seed(2))
    ratios = loss[picks].sum(1) / tokens[picks].sum(1)
    assert sums_of(loss, tokens).estimate().error == pytest.approx(ratios.std().item(), rel=0.08)


def test_sums_add_up_over_batches_and_ranks() -> None:
    loss, tokens = population(64, 3)
    whole = sums_of(loss, tokens)
    pieces = BoundSums()
    for start in (0, 10, 40):
        stop = {0: 10, 10: 40, 40: 64}[start]
        pieces.add(loss[start:stop].float(), tokens[start:stop])
    assert pieces.as_list() == pytest.approx(whole.as_list(), rel=1e-6)
    ranks = [sums_of(loss[:20], tokens[:20]), sums_of(loss[20:], tokens[20:])]
    reduced = BoundSums(*(a + b for a, b in zip(ranks[0].as_list(), ranks[1].as_list())))
    assert reduced.estimate().value == pytest.approx(whole.estimate().value, rel=1e-14)
    assert reduced.estimate().error == pytest.approx(whole.estimate().error, rel=1e-9)


def test_a_constant_loss_per_token_has_no_error() -> None:
    tokens = torch.arange(1, 50)
    bound = sums_of(tokens * 1.25, tokens).estimate()
    assert bound.value == pytest.approx(1.25)
    assert bound.error < 1e-7


def test_nothing_measured_is_not_a_number() -> None:
    for sums in (BoundSums(), sums_of(torch.zeros(3), torch.zeros(3))):
        bound = sums.estimate()
        assert math.isnan(bound.value)
        assert math.isnan(bound.error)
        assert bound.tokens == 0
