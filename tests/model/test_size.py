"""Numbers of parameters against a plain count, and the control that is as large as a model with a latent."""

from dataclasses import replace

import pytest

from model.config import LatentConfig, ModelConfig, PointMlpConfig, RecognitionConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.size import matched_control, num_parameters

BACKBONE = TransformerConfig(dim=16, num_layers=2, num_heads=2, condition_dim=8)
SMALL = RecognitionConfig(num_layers=1)
MODELS = {
    "vmd": ModelConfig(backbone=BACKBONE, vocab_size=13, mask_id=10, latent=LatentConfig(dim=5, recognition=SMALL)),
    "timed": ModelConfig(
        backbone=BACKBONE, vocab_size=13, mask_id=10, latent=LatentConfig(dim=5), time_conditioning=True
    ),
    "blocks": ModelConfig(backbone=BACKBONE, vocab_size=13, mask_id=10, latent=LatentConfig(dim=5), block_size=2),
    "point": ModelConfig(
        backbone=PointMlpConfig(dim=16, num_layers=2),
        vocab_size=13,
        mask_id=10,
        latent=LatentConfig(dim=2, inject="embedding"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_control_is_as_large_or_a_layer_larger(name: str) -> None:
    config = MODELS[name]
    target = num_parameters(config)
    assert target == sum(parameter.numel() for parameter in MaskedDiffusion(config).parameters())
    control = matched_control(config)
    assert control.latent is None
    assert list(control.problems()) == []
    assert (control.block_size, control.time_conditioning) == (config.block_size, config.time_conditioning)
    fewer = replace(control.backbone, num_layers=control.backbone.num_layers - 1)
    assert num_parameters(replace(control, backbone=fewer)) < target <= num_parameters(control)


def test_the_count_is_the_formula() -> None:
    """A GELU decoder layer holds 4 D^2 of attention, 8 D^2 of feed-forward, and two norms."""
    config = ModelConfig(backbone=replace(BACKBONE, condition_dim=0), vocab_size=13, mask_id=10)
    assert num_parameters(config) == 2 * 13 * 16 + 2 * (12 * 16**2 + 4 * 16) + 2 * 16
