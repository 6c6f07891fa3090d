"""Tiny random models that hear everything they are given, and a way to watch a sampler call them."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.sampling.state import SamplerState
from model.config import (
    AugmentationConfig,
    BackboneConfig,
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    TransformerConfig,
)
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise

MASK = 4

Tiny = Callable[..., MaskedDiffusion]
Blank = Callable[..., SamplerState]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A model of four symbols and a mask whose every parameter is random, from settings that name its switches.

    latent and augmentation are dictionaries of their settings; backbone those of the transformer.
    """

    def make(
        *,
        latent: dict[str, Any] | None = None,
        augmentation: dict[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        loud: float = 0.3,
        **settings: Any,
    ) -> MaskedDiffusion:
        trunk: BackboneConfig
        if settings.pop("point", False):
            trunk = PointMlpConfig(dim=16, num_layers=2, num_dimensions=2)
        else:
            conditioned = settings.get("time_conditioning", False) or (latent or {}).get("inject") == "adaln"
            trunk = TransformerConfig(
                **{"dim": 16, "num_layers": 2, "num_heads": 2, "condition_dim": 8 * conditioned, **(backbone or {})}
            )
        config = ModelConfig(
            backbone=trunk,
            vocab_size=MASK + 1,
            mask_id=MASK,
            latent=None if latent is None else LatentConfig(recognition=RecognitionConfig(num_layers=1), **latent),
            augmentation=None if augmentation is None else AugmentationConfig(**augmentation),
            **settings,
        )
        assert list(config.problems()) == []
        model = MaskedDiffusion(config)
        initialise(model, 0, num_layers=1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * loud)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def blank() -> Blank:
    """Rows of masks behind prompts of the lengths asked for."""

    def make(
        rows: int, length: int, *, prompts: tuple[int, ...] = (0,), seed: int = 0, first_index: int = 0
    ) -> SamplerState:
        number_B = torch.arange(first_index, first_index + rows)
        prompt_B = torch.tensor(prompts)[number_B % len(prompts)]
        masked_BL = torch.arange(length) >= prompt_B[:, None]
        tokens_BL = (number_B[:, None] * 5 + torch.arange(length) ** 2) % MASK
        return SamplerState.start(tokens_BL, masked_BL, mask_id=MASK, seed=seed, first_index=first_index)

    return make


@dataclass(frozen=True)
class Call:
    """One call of `denoise`: what it was given, and what came out."""

    x_t: Tensor
    given: dict[str, Any]
    hidden: Tensor


Watch = Callable[[MaskedDiffusion], list[Call]]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The calls of a model's `denoise` from now on, in a list that grows."""

    def install(model: MaskedDiffusion) -> list[Call]:
        calls: list[Call] = []
        denoise = model.denoise

        def recording(x_t: Tensor, **given: Any) -> Tensor:
            hidden = denoise(x_t, **given)
            calls.append(Call(x_t.clone(), given, hidden))
            return hidden

        monkeypatch.setattr(model, "denoise", recording)
        return calls

    return install


@pytest.fixture(scope="session")
def misfit() -> Callable[[Tensor, Mapping[tuple[int, ...], float]], float]:
    """By how many of its standard deviations chi-square exceeds its mean: below 5 where samples [N, L] follow."""

    def measure(samples_NL: Tensor, expected: Mapping[tuple[int, ...], float]) -> float:
        assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
        seen, number = Counter(map(tuple, samples_NL.tolist())), len(samples_NL)
        assert seen.keys() <= expected.keys()
        likely = [x for x, p in expected.items() if number * p > 5]
        cells = [(seen[x], number * expected[x]) for x in likely]
        if len(likely) < len(expected):
            found, wanted = (number - sum(column) for column in zip(*cells, strict=True))
            cells.append((found, max(1.0, wanted)))  # type: ignore[arg-type]
        freedom = len(cells) - 1
        chi_square = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
        return float((chi_square - freedom) / math.sqrt(2 * freedom))

    return measure
