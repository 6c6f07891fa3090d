"""The sharding table names every parameter of every recipe once; the large recipes have the published sizes."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from pretrain.parallel.layout import LAYOUT, SHARDING_UNITS, role_of
from pretrain.recipes import recipes

CONDITIONED = TransformerConfig(dim=16, num_layers=2, num_heads=2, condition_dim=8)
VARIANTS = {
    "conditioned": ModelConfig(backbone=CONDITIONED, time_conditioning=True),
    "shared": ModelConfig(backbone=replace(CONDITIONED, modulation="shared"), time_conditioning=True),
    "conditioned decoder": ModelConfig(
        backbone=replace(CONDITIONED, norm="rmsnorm", ffn="swiglu", qkv_bias=True, num_kv_heads=1),
        time_conditioning=True,
    ),
}
CONFIGS = VARIANTS | {name: recipe().model for name, recipe in recipes().items()}


def on_meta(config: ModelConfig) -> MaskedDiffusion:
    if config.mask_id < 0:
        config = config.with_vocabulary(1000, 999)
    with torch.device("meta"):
        return MaskedDiffusion(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_role_that_fits_its_shape(name: str) -> None:
    model = on_meta(CONFIGS[name])
    b, vocabulary = model.config.backbone, model.config.vocab_size
    inner = {b.num_heads * b.head_width, b.kv_heads * b.head_width, b.ffn_width}
    for parameter, tensor in model.named_parameters():
        role = role_of(parameter)
        if role == "vocab":
            assert tensor.shape == (vocabulary, b.dim)
        elif role == "column":
            assert tensor.shape[0] in inner
        elif role == "row":
            assert tensor.shape[0] == b.dim
            assert tensor.shape[1] in inner
        else:
            assert tensor.dim() == 1 or "modulation" in parameter or "time" in parameter


def test_every_row_of_the_table_is_used() -> None:
    roles = {role_of(name) for config in CONFIGS.values() for name, _ in on_meta(config).named_parameters()}
    assert roles == {role for _, role in LAYOUT}


@pytest.mark.parametrize("name", ["denoiser.blocks.0.attention.q", "blocks.0.ffn.up.weight", "denoiser.pool.weight"])
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="0 rows"):
        role_of(name)


def test_units_are_the_blocks() -> None:
    import re

    model = on_meta(CONFIGS["conditioned"])
    found = [name for name, _ in model.named_modules() if re.fullmatch(SHARDING_UNITS, name)]
    assert found == ["denoiser.blocks.0", "denoiser.blocks.1"]


@pytest.mark.parametrize(("name", "billions"), [("coder_0_5b", 0.494), ("coder_1_5b", 1.544), ("coder_7b", 7.616)])
def test_the_coders_have_the_published_numbers_of_parameters(name: str, billions: float) -> None:
    """Also counted by transformers' own Qwen2 of the published shape."""
    import transformers

    config = recipes()[name]().model
    ours = sum(parameter.numel() for parameter in on_meta(config).parameters())
    assert ours / 1e9 == pytest.approx(billions, abs=0.0006)
    b = config.backbone
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
