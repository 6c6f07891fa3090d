"""The counted operations against PyTorch's own counter on real passes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, TransformerConfig
from model.flops import forward_flops, training_flops
from model.transformer import Transformer

DIT = TransformerConfig(dim=32, num_layers=3, num_heads=4)
BACKBONES = {
    "dit": DIT,
    "decoder": replace(DIT, norm="rmsnorm", ffn="swiglu", num_kv_heads=2, qkv_bias=True, tie_embeddings=True),
    "wide heads": replace(DIT, head_dim=16, ffn_dim=40),
    "conditioned": replace(DIT, condition_dim=12),
    "shared": replace(DIT, condition_dim=12, modulation="shared"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_flops_are_those_of_a_real_pass(name: str) -> None:
    config = ModelConfig(backbone=BACKBONES[name], vocab_size=50, mask_id=49)
    model = Transformer(config.backbone, 50)
    size = config.backbone.condition_dim
    condition = torch.randn(2, size, requires_grad=True) if size else None
    embedded = torch.randn(2, 24, 32, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        logits = model.logits(model(embedded, condition=condition).flatten(0, 1)[:17])
        forward = counter.get_total_flops()
        logits.sum().backward()
    assert forward_flops(config, num_sequences=2, length=24, num_rows=17) == forward
    assert training_flops(config, num_sequences=2, length=24, num_rows=17) == counter.get_total_flops()


def test_the_usual_estimate_of_six_flops_per_parameter_and_token() -> None:
    backbone = TransformerConfig(
        dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, ffn_dim=18_944, norm="rmsnorm", ffn="swiglu"
    )
    config = ModelConfig(backbone=backbone, vocab_size=152_064, mask_id=0)
    flops = training_flops(config, num_sequences=1, length=512, num_rows=512)
    parameters = 7.62e9 - 152_064 * 3584  # the embedding table is looked up, not multiplied
    assert flops == pytest.approx(6 * parameters * 512, rel=0.02)
