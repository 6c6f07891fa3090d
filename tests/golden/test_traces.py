"""Loss traces that a change which should not alter numerics must repeat.

`python tests/golden/test_traces.py` records them again; say in the same commit why they moved.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loader import Loader
from data_pipeline.order import Order
from model.config import (
    AugmentationConfig,
    LatentConfig,
    ModelConfig,
    PointMlpConfig,
    RecognitionConfig,
    ScheduleConfig,
    TransformerConfig,
)
from model.diffusion import StepSchedule
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from pretrain.schedules import learning_rate
from pretrain.trainer import corrupt_step

TRACES = Path(__file__).with_name("traces.json")
DIT = TransformerConfig(dim=32, num_layers=2, num_heads=2)
CONDITIONED = replace(DIT, condition_dim=16)
BASE = ModelConfig(backbone=DIT, vocab_size=33, mask_id=32)
QWEN = TransformerConfig(
    dim=32, num_layers=2, num_heads=4, num_kv_heads=2, norm="rmsnorm", ffn="swiglu", qkv_bias=True, tie_embeddings=True
)
MODELS = {
    "dit": BASE,
    "dit_timed": replace(
        BASE,
        backbone=replace(CONDITIONED, dropout=0.1),
        time_conditioning=True,
        schedule=ScheduleConfig(kind="cosine"),
    ),
    "qwen_uniform": replace(BASE, backbone=QWEN, loss_weight="uniform"),
    "vadd": replace(BASE, backbone=CONDITIONED, latent=LatentConfig(dim=8)),
    "block_vmd": replace(
        BASE,
        backbone=replace(CONDITIONED, modulation="shared"),
        block_size=4,
        latent=LatentConfig(dim=8, recognition=RecognitionConfig(num_layers=1, pool="gated")),
    ),
    "cadd": replace(BASE, augmentation=AugmentationConfig()),
    "ar": replace(BASE, autoregressive=True),
    "point_mlp": replace(
        BASE,
        backbone=PointMlpConfig(dim=32, num_layers=2, num_dimensions=16),
        time_conditioning=True,
        latent=LatentConfig(dim=2, inject="embedding"),
    ),
}


class Arithmetic:
    """Rows that count upwards in steps: something to learn, from nothing but the index."""

    def __len__(self) -> int:
        return 64

    def gather(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        position = torch.arange(16).expand(len(indices), 16)
        start = torch.from_numpy(indices)[:, None]
        return {
            "tokens": (start + position * (1 + start % 3)) % 32,
            "maskable": position > 0,
            "document": torch.zeros(position.shape, dtype=torch.int32),
            "positions": position,
        }


def trace(model: ModelConfig, steps: int = 12, device: str = "cpu") -> list[float]:
    optim, source, mesh = OptimConfig(lr=3e-3, warmup_steps=4), Arithmetic(), single_process(torch.device(device))
    engine = FsdpEngine(model, optim, TrainConfig(), ParallelConfig(), mesh, seed=1)
    losses = []
    loader = Loader(
        source,
        Order(len(source), 1),
        global_batch=8,
        rank=0,
        size=1,
        first_step=0,
        num_steps=steps,
        num_workers=0,
        transform=partial(corrupt_step, model=model, seed=1, schedule=lambda step: StepSchedule()),
    )
    for step, micro in enumerate(loader):
        terms = engine.forward_backward(micro, scale=1 / micro.corruption.divisor, last=True)
        engine.reduce_and_clip(1.0)
        engine.step(lr=learning_rate(step, optim, steps), take=torch.ones((), device=device))
        losses.append(float(terms.loss) / micro.corruption.divisor)
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_loss_trace_is_unchanged(name: str) -> None:
    expected = json.loads(TRACES.read_text())[name]
    assert trace(MODELS[name]) == pytest.approx(expected, rel=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_follows_the_same_trace(name: str) -> None:
    expected = json.loads(TRACES.read_text())[name]
    assert trace(MODELS[name], device="cuda") == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    TRACES.write_text(json.dumps({name: trace(model) for name, model in MODELS.items()}, indent=1) + "\n")
    sys.stdout.write(TRACES.read_text())
