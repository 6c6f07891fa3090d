"""Initial weights: a function of seed and name alone, with the intended statistics."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from model import initialisation
from model.config import AugmentationConfig, LatentConfig, ModelConfig, PointMlpConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise

BACKBONE = TransformerConfig(
    dim=64, num_layers=3, num_heads=4, norm="rmsnorm", ffn="swiglu", num_kv_heads=2, qkv_bias=True
)
CONFIG = ModelConfig(backbone=BACKBONE, vocab_size=301, mask_id=300)
TIMED = replace(CONFIG, backbone=replace(BACKBONE, condition_dim=16, norm="layernorm"), time_conditioning=True)
SWITCHED = replace(
    CONFIG,
    backbone=replace(BACKBONE, condition_dim=64, gates="one", max_positions=50),
    block_size=4,
    latent=LatentConfig(dim=40, prior="earlier_blocks"),
    augmentation=AugmentationConfig(fusion="concat"),
)
POINT = replace(
    CONFIG,
    backbone=PointMlpConfig(dim=64, num_layers=3),
    time_conditioning=True,
    latent=LatentConfig(dim=40, inject="embedding"),
)


def weights(config: ModelConfig = CONFIG, seed: int = 0, *, meta: bool = False) -> dict[str, torch.Tensor]:
    if meta:
        with torch.device("meta"):
            model = MaskedDiffusion(config)
        model.to_empty(device="cpu")
    else:
        model = MaskedDiffusion(config)
    initialise(model, seed, num_layers=config.backbone.num_layers)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [TIMED, SWITCHED, POINT], ids=["timed", "switched", "point"])
def test_the_same_from_the_meta_device_and_after_other_draws(config: ModelConfig) -> None:
    first = weights(config)
    torch.manual_seed(123)
    torch.randn(7)
    second = weights(config, meta=True)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_name_has_its_weights_whatever_surrounds_it() -> None:
    """Reversed registration and a missing layer change nothing for the others."""
    model = MaskedDiffusion(CONFIG)
    reordered = MaskedDiffusion(CONFIG)
    reordered.denoiser._modules = dict(reversed(reordered.denoiser._modules.items()))
    shallow = MaskedDiffusion(replace(CONFIG, backbone=replace(BACKBONE, num_layers=2)))
    for each in (model, reordered, shallow):
        initialise(each, 5, num_layers=3)
    wanted = dict(model.named_parameters())
    assert list(wanted) != [name for name, _ in reordered.named_parameters()]
    for other in (reordered, shallow):
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter, wanted[name])


def test_seeds_and_names_draw_different_weights() -> None:
    first, second = weights(seed=0), weights(seed=1)
    block = "denoiser.blocks.{}.ffn.up.weight"
    pairs = [
        (first[block.format(0)], second[block.format(0)]),
        (first[block.format(0)], first[block.format(1)]),
        (first[block.format(0)], first["denoiser.blocks.0.ffn.gate.weight"]),
        (first["denoiser.embed.weight"], first["denoiser.head.weight"]),
    ]
    for one, two in pairs:
        correlation = torch.corrcoef(torch.stack((one.flatten(), two.flatten())))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(one.numel())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_have_their_standard_deviations(tied: bool) -> None:
    shared = dict.fromkeys(("attention.out", "ffn.down"), 1 / math.sqrt(2 * 3))
    fixed = {"denoiser.embed.weight": 0.02 if tied else 1.0, "denoiser.head.weight": 0.02}
    for name, parameter in weights(replace(CONFIG, backbone=replace(BACKBONE, tie_embeddings=tied))).items():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            part = next((v for k, v in shared.items() if name.endswith(f"{k}.weight")), 1.0)
            scale = fixed.get(name, part / math.sqrt(parameter.shape[1]))
            assert stats.kstest((parameter / scale).flatten().double().numpy(), "norm").pvalue > 1e-4, name


def test_modulation_starts_at_zero_and_time_does_not() -> None:
    found = weights(TIMED)
    assert not any(parameter.any() for name, parameter in found.items() if "modulation" in name)
    assert found["denoiser.time.inner.weight"].any()
    assert found["denoiser.time.outer.weight"].any()


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights()
    monkeypatch.setattr(initialisation, "CHUNK", 1000)
    assert all(torch.equal(whole[name], parameter) for name, parameter in weights().items())


def test_latents_and_hints_start_as_they_should() -> None:
    found = weights(SWITCHED)
    head = "latent.recognition.head"
    for name in (
        f"{head}.log_std.weight",
        f"{head}.log_std.bias",
        f"{head}.mean.bias",
        "latent.prior.head.log_std.weight",
    ):
        assert not found[name].any(), name
    projection = found["augmentation.projection.weight"]
    assert torch.equal(projection, torch.cat((torch.eye(64), torch.zeros(64, 64)), 1))
    gated = weights(replace(SWITCHED, augmentation=AugmentationConfig(gated=True)))
    assert gated["augmentation.gate"].tolist() == [0.0]
    scales = {
        f"{head}.mean.weight": 1 / math.sqrt(64),
        "latent.recognition.mark.weight": 1.0,
        "latent.recognition.trunk.embed.weight": 1.0,
        "latent.recognition.trunk.blocks.0.ffn.down.weight": 1 / math.sqrt(6 * BACKBONE.ffn_width),
        "latent.prior.trunk.embed.weight": 1.0,
        "latent.prior.project.weight": 1 / math.sqrt(40),
        "latent.embedding.inner.weight": 1 / math.sqrt(40),
        "latent.embedding.outer.weight": 1 / math.sqrt(64),
        "denoiser.place.weight": 1.0,
    }
    for name, scale in scales.items():
        assert stats.kstest((found[name] / scale).flatten().double().numpy(), "norm").pvalue > 1e-4, name


def test_perceptrons_start_as_they_should() -> None:
    found = weights(POINT)
    recognition = "latent.recognition.mlp"
    scales = {
        "denoiser.embed.weight": 1.0,
        "denoiser.head.weight": 0.02,
        "denoiser.layers.layers.1.weight": 1 / 8,
        f"{recognition}.embed.weight": 1.0,
        f"{recognition}.layers.layers.0.weight": 1 / 8,
        f"{recognition}.join.weight": 1 / 8,
    }
    for name, scale in scales.items():
        assert stats.kstest((found[name] / scale).flatten().double().numpy(), "norm").pvalue > 1e-4, name


def test_a_parent_gives_its_weights_to_every_switch() -> None:
    """The denoiser's names do not depend on what is switched on beside it."""
    parent, child = weights(CONFIG), weights(SWITCHED)
    assert all(torch.equal(child[name], parameter) for name, parameter in parent.items())


@pytest.mark.parametrize("config", [TIMED, SWITCHED, POINT], ids=["timed", "switched", "point"])
def test_every_parameter_is_overwritten(config: ModelConfig) -> None:
    model = MaskedDiffusion(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    initialise(model, 0, num_layers=3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
