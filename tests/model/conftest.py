"""What the tests of the switches share: models with random weights, and rows of random tokens."""

from collections.abc import Callable

import pytest
import torch

from model.batch import Batch
from model.config import ModelConfig
from model.diffusion import MaskedDiffusion


@pytest.fixture(scope="session")
def build() -> Callable[..., MaskedDiffusion]:
    """A model in float64 with every parameter random, the ones that start at zero too."""

    def build(config: ModelConfig, *, scale: float = 0.3) -> MaskedDiffusion:
        assert not list(config.problems())
        model = MaskedDiffusion(config).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return model

    return build


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Sequences of tokens below `symbols`, most positions maskable."""

    def make(num_sequences: int, length: int, symbols: int, *, maskable: float = 0.8) -> Batch:
        generator = torch.Generator().manual_seed(1)
        return Batch(
            tokens_BL=torch.randint(0, symbols, (num_sequences, length), generator=generator),
            maskable_BL=torch.rand(num_sequences, length, generator=generator) < maskable,
            positions_BL=torch.arange(length).expand(num_sequences, length),
            index_B=torch.arange(num_sequences) + 100,
        )

    return make
