"""The benchmark of a GPU, as far as a CPU goes: its steps train, its operations are those of the model it trains."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig, TransformerConfig
from model.flops import training_flops
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from tools.bench import gpu
from tools.bench.gpu import VARIANTS, as_table

VOCABULARY = 40
ON_A_CPU = {"recompute": "full"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LENGTH", 64)
    monkeypatch.setattr(gpu, "DOCUMENT", 24)
    monkeypatch.setattr(gpu, "VOCABULARY", VOCABULARY)


def shrunk(model: ModelConfig) -> ModelConfig:
    backbone = model.backbone
    assert isinstance(backbone, TransformerConfig)
    backbone = replace(
        backbone, dim=32, num_layers=4, num_heads=4, ffn_dim=64, condition_dim=min(8, backbone.condition_dim)
    )
    latent = model.latent
    if latent is not None:
        latent = replace(latent, dim=8, recognition=replace(latent.recognition, num_layers=1))
    return replace(model, backbone=backbone, vocab_size=VOCABULARY, mask_id=VOCABULARY - 1, latent=latent)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(name: str) -> None:
    variant = VARIANTS[name]
    model = shrunk(variant.model)
    train = TrainConfig(**ON_A_CPU)  # type: ignore[arg-type]
    engine = FsdpEngine(model, OptimConfig(), train, ParallelConfig(), single_process(), seed=0)
    before = {key: p.detach().clone() for key, p in engine.parameters.items()}
    step, work = gpu._step(engine, replace(variant, model=model))
    step()
    assert any(not torch.equal(before[key], p) for key, p in engine.parameters.items())
    fewest, most = (
        training_flops(model, num_sequences=gpu.NUM_SEQUENCES, length=64, num_rows=rows)
        for rows in (1, gpu.NUM_SEQUENCES * 64)
    )
    assert fewest <= work <= most
    assert TrainConfig(precision="bf16", **variant.train).attention in ("auto", "sdpa", "flash", "flex")


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*penumbra bench step"):
        gpu.measure(1)


def test_the_table_has_a_line_per_variant() -> None:
    keys = ("tokens_per_second", "mfu", "gib", "tokens_per_second_ratio")
    lines = as_table({f"gpu.{name}.{key}": 0.5 for name in VARIANTS for key in keys}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(VARIANTS)
