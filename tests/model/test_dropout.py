"""Counter-based dropout: keyed by sample and site, repeated by recomputation.

Shapes: B sequences, L positions, D width.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import layers
from model.config import TransformerConfig
from model.noise import NoiseKey, Stream
from model.recompute import Recompute
from model.sequence import Span
from model.transformer import Transformer

VOCABULARY, LENGTH = 23, 12
SMALL = TransformerConfig(dim=16, num_layers=2, num_heads=2)
CONDITIONED = replace(SMALL, condition_dim=6)


def build(config: TransformerConfig) -> Transformer:
    """A model in float32 with every parameter random."""
    model = Transformer(config, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(num_sequences: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_sequences, LENGTH), generator=torch.Generator().manual_seed(1))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def dropout_stream(first: int = 0, count: int = 2) -> Stream:
    return NoiseKey(0, 1, torch.arange(first, first + count)).stream("dropout")


@pytest.mark.parametrize("config", [SMALL, CONDITIONED, replace(CONDITIONED, modulation="shared")], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_recomputation_repeats_the_forward_pass(config: TransformerConfig, rate: float) -> None:
    model = build(replace(config, dropout=rate))
    condition = random(2, 6) if config.condition_dim else None
    results = []
    choices: tuple[Recompute, ...] = ("none", "full", "selective")
    for recompute in choices:
        model.recompute = recompute
        model.zero_grad()
        hidden = model(tokens(), condition=condition, dropout=dropout_stream())
        (hidden * random(2, LENGTH, 16)).sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == len(results[2]) > 10
    for plain, full, selective in zip(*results):
        assert torch.equal(plain, full)
        assert torch.equal(plain, selective)


@torch.no_grad()
def test_dropout_is_keyed_by_sample_and_absent_in_evaluation() -> None:
    model, ids = build(replace(SMALL, dropout=0.3)), tokens(4)
    whole = model(ids, dropout=dropout_stream(0, 4))
    halves = [model(ids[s : s + 2], dropout=dropout_stream(s)) for s in (0, 2)]
    assert torch.allclose(torch.cat(halves), whole, atol=2e-5)
    assert not torch.allclose(model(ids, dropout=dropout_stream(4, 4)), whole, atol=1e-2)
    assert torch.equal(model(ids), build(SMALL)(ids))


@torch.no_grad()
def test_dropout_keeps_the_mean_and_its_streams_are_independent() -> None:
    ones = torch.ones(2, 200, 50)
    stream = dropout_stream()
    dropped = [layers.dropout(ones, 0.25, stream.fold(site)) for site in range(4)]
    for one in dropped:
        assert set(one.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((one == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / one.numel()) ** 0.5
    kept = torch.stack([(one != 0).double().flatten() for one in dropped])
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 5 / ones.numel() ** 0.5


@pytest.mark.parametrize("config", [SMALL, CONDITIONED], ids=["plain", "conditioned"])
@torch.no_grad()
def test_every_sublayer_of_every_block_has_its_own_stream(
    config: TransformerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(x_BLD: Tensor, rate: float, stream: Stream, part: Span | None) -> Tensor:
        seen.append(stream.key_B)
        return x_BLD

    monkeypatch.setattr(layers, "dropout", record)
    condition = random(2, 6) if config.condition_dim else None
    build(replace(config, num_layers=3, dropout=0.1))(tokens(), condition=condition, dropout=dropout_stream())
    assert len(seen) == 2 * 3
    assert torch.stack(seen).unique().numel() == 2 * 2 * 3
