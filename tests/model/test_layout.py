"""The sharding table names every parameter of every recipe once; the large recipes have the published sizes."""

import re
from dataclasses import replace

import pytest
import torch

from model.config import (
    AugmentationConfig,
    LatentConfig,
    ModelConfig,
    RecognitionConfig,
    TransformerConfig,
    recognition_backbone,
)
from model.diffusion import MaskedDiffusion
from pretrain.parallel.layout import LAYOUT, SHARDING_UNITS, role_of
from pretrain.recipes import recipes

PLAIN = TransformerConfig(dim=16, num_layers=2, num_heads=2)
CONDITIONED = replace(PLAIN, condition_dim=8)
DECODER = replace(PLAIN, norm="rmsnorm", ffn="swiglu", qkv_bias=True, num_kv_heads=1, max_positions=32)
GATED = RecognitionConfig(num_layers=1, marks="added", pool="gated")
VARIANTS = {
    "conditioned": ModelConfig(backbone=CONDITIONED, time_conditioning=True),
    "shared": ModelConfig(backbone=replace(CONDITIONED, modulation="shared"), time_conditioning=True),
    "conditioned decoder": ModelConfig(backbone=replace(DECODER, condition_dim=8), time_conditioning=True),
    "vadd": ModelConfig(backbone=CONDITIONED, latent=LatentConfig()),
    "vadd decoder": ModelConfig(backbone=replace(DECODER, condition_dim=8), latent=LatentConfig()),
    "prior given x_t": ModelConfig(
        backbone=DECODER, latent=LatentConfig(prior="x_t", inject="embedding", recognition=GATED)
    ),
    "prior given blocks": ModelConfig(
        backbone=CONDITIONED, block_size=4, latent=LatentConfig(prior="earlier_blocks", recognition=GATED)
    ),
    "small encoder": ModelConfig(backbone=CONDITIONED, latent=LatentConfig(recognition=RecognitionConfig(dim=8))),
    "gated hints": ModelConfig(backbone=PLAIN, augmentation=AugmentationConfig(gated=True)),
    "projected hints": ModelConfig(backbone=PLAIN, augmentation=AugmentationConfig(fusion="concat")),
}
RECIPES = {name: recipe.build().model for name, recipe in recipes().items()}
CONFIGS = VARIANTS | {name: model for name, model in RECIPES.items() if model.backbone.kind == "transformer"}


def on_meta(config: ModelConfig) -> MaskedDiffusion:
    if config.mask_id < 0:
        config = config.with_vocabulary(1000, 999)
    assert not list(config.problems())
    with torch.device("meta"):
        return MaskedDiffusion(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_role_that_fits_its_shape(name: str) -> None:
    model = on_meta(CONFIGS[name])
    for parameter, tensor in model.named_parameters():
        b = recognition_backbone(model.config) if parameter.startswith("latent.") else model.config.backbone
        assert isinstance(b, TransformerConfig)
        inner = {b.num_heads * b.head_width, b.kv_heads * b.head_width, b.ffn_width}
        role = role_of(parameter)
        if role == "vocab":
            assert tensor.shape == (model.config.vocab_size, b.dim)
        elif role == "column":
            assert tensor.shape[0] in inner
        elif role == "row":
            assert tensor.shape[0] == b.dim
            assert tensor.shape[1] in inner
        else:
            small = r"modulation|time|place|mark|score|project|head|latent\.embedding|prior\.trunk\.embed"
            assert tensor.dim() == 1 or re.search(small, parameter)


def test_every_row_of_the_table_is_used() -> None:
    names = {name for config in CONFIGS.values() for name, _ in on_meta(config).named_parameters()}
    for pattern, _ in LAYOUT:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


@pytest.mark.parametrize("name", ["denoiser.blocks.0.attention.q", "blocks.0.ffn.up.weight", "denoiser.pool.weight"])
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="0 rows"):
        role_of(name)


def test_units_are_the_blocks() -> None:
    def units(name: str) -> list[str]:
        return [unit for unit, _ in on_meta(CONFIGS[name]).named_modules() if re.fullmatch(SHARDING_UNITS, unit)]

    denoiser = ["denoiser.blocks.0", "denoiser.blocks.1"]
    assert units("conditioned") == denoiser
    others = ["latent.recognition.trunk.blocks.0", "latent.prior.trunk.blocks.0"]
    assert units("prior given x_t") == units("prior given blocks") == denoiser + others


@pytest.mark.parametrize(("name", "billions"), [("coder_0_5b", 0.494), ("coder_1_5b", 1.544), ("coder_7b", 7.616)])
def test_the_coders_have_the_published_numbers_of_parameters(name: str, billions: float) -> None:
    """Also counted by transformers' own Qwen2 of the published shape."""
    import transformers

    config = RECIPES[name]
    ours = sum(parameter.numel() for parameter in on_meta(config).parameters())
    assert ours / 1e9 == pytest.approx(billions, abs=0.0006)
    b = config.backbone
    assert isinstance(b, TransformerConfig)
    foreign_config = transformers.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=b.dim,
        intermediate_size=b.ffn_width,
        num_hidden_layers=b.num_layers,
        num_attention_heads=b.num_heads,
        num_key_value_heads=b.kv_heads,
        tie_word_embeddings=b.tie_embeddings,
    )
    with torch.device("meta"):
        foreign = transformers.Qwen2ForCausalLM(foreign_config)
    assert ours == sum(parameter.numel() for parameter in foreign.parameters())
