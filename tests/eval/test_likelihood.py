"""The bound of a checkpoint: exact values by enumeration, and what it must not depend on."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data_pipeline.packing import Rows
from eval.likelihood import bound
from model.config import ModelConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise

MASK, LENGTH = 4, 3


class Symbols:
    """Rows of three symbols; the first of the last row is a prompt."""

    def __init__(self, rows: int = 6) -> None:
        self.tokens = torch.randint(4, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
        self.maskable = torch.ones(rows, LENGTH, dtype=torch.bool)
        self.maskable[-1, 0] = False

    def __len__(self) -> int:
        return len(self.tokens)

    def gather(self, indices: npt.NDArray[np.int64]) -> Rows:
        rows = torch.from_numpy(indices)
        return {
            "tokens": self.tokens[rows],
            "maskable": self.maskable[rows],
            "document": torch.zeros(len(rows), LENGTH, dtype=torch.int32),
            "positions": torch.arange(LENGTH).expand(len(rows), LENGTH),
        }


@pytest.fixture(scope="module")
def model() -> MaskedDiffusion:
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, dropout=0.5)
    model = MaskedDiffusion(ModelConfig(backbone=backbone, vocab_size=5, mask_id=MASK))
    initialise(model, 0, num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


@torch.inference_mode()
def exact(model: MaskedDiffusion, source: Symbols) -> float:
    """E over n uniform on 1..N and subsets of n of N / n times the cross-entropy, over all rows, per token."""
    model.eval()
    total = 0.0
    for tokens, maskable in zip(source.tokens, source.maskable, strict=True):
        free = maskable.nonzero()[:, 0].tolist()
        for n in range(1, len(free) + 1):
            subsets = list(itertools.combinations(free, n))
            for subset in subsets:
                x = tokens.clone()
                x[list(subset)] = MASK
                log_probs = model.logits(model.denoise(x[None])[0]).double().log_softmax(1)
                total -= sum(float(log_probs[i, tokens[i]]) for i in subset) / n / len(subsets)
    return total / int(source.maskable.sum())


def test_the_bound_is_the_enumerated_expectation(model: MaskedDiffusion) -> None:
    found = [bound(model, Symbols(), num_draws=100, seed=seed) for seed in range(10)]
    assert {f.tokens for f in found} == {17}
    error = float(np.std([f.nelbo for f in found], ddof=1)) / math.sqrt(10)
    assert abs(np.mean([f.nelbo for f in found]) - exact(model, Symbols())) < 5 * error
    assert error < 0.02


def test_the_error_is_the_spread_over_rows_however_many_draws(model: MaskedDiffusion) -> None:
    source = Symbols(64)
    source.maskable[:] = True
    rows = [Symbols(1) for _ in range(64)]
    for row, tokens in zip(rows, source.tokens, strict=True):
        row.tokens, row.maskable = tokens[None], torch.ones(1, LENGTH, dtype=torch.bool)
    spread = float(np.std([exact(model, row) for row in rows]))
    assert bound(model, source, num_draws=300).error == pytest.approx(spread / math.sqrt(64), rel=0.1)


def test_a_uniform_model_has_the_entropy_of_the_symbols(model: MaskedDiffusion) -> None:
    blind = MaskedDiffusion(model.config)
    assert blind.denoiser.head is not None
    with torch.no_grad():
        blind.denoiser.head.weight.zero_()
    found = bound(blind, Symbols(), num_draws=3)
    assert found.nelbo == pytest.approx(math.log(4), rel=1e-6)
    assert found.error < 1e-4


def test_the_batch_size_and_the_mode_change_nothing(model: MaskedDiffusion) -> None:
    model.train()
    whole = bound(model, Symbols(), num_draws=2)
    for batch_size in (1, 4):
        other = bound(model, Symbols(), num_draws=2, batch_size=batch_size)
        assert other.nelbo == pytest.approx(whole.nelbo, rel=1e-6)
        assert other.tokens == whole.tokens
    assert bound(model, Symbols(), num_draws=2).nelbo == whole.nelbo
    assert bound(model, Symbols(), num_draws=2, seed=1).nelbo != whole.nelbo


def test_only_the_first_rows_are_measured(model: MaskedDiffusion) -> None:
    part, whole = Symbols(), Symbols()
    part.tokens, part.maskable = part.tokens[:2], part.maskable[:2]
    found = bound(model, whole, num_sequences=2, num_draws=3)
    assert found == bound(model, part, num_draws=3)
    assert bound(model, part, num_sequences=100, num_draws=3) == found
