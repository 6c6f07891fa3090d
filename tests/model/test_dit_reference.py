"""The DiT block and its time embedding against a plain rewriting of the papers (Peebles and Xie 2023; Su et al. 2021).

Shapes: B sequences, L positions, D width, H heads, K head width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import TransformerConfig
from model.layers import TimeEmbedding
from model.transformer import Transformer

HEADS, WIDTH, LENGTH = 2, 16, 9
CONFIG = TransformerConfig(dim=WIDTH, num_layers=2, num_heads=HEADS, condition_dim=6)


def turned(x_LHK: Tensor) -> Tensor:
    """Rotary positions by complex multiplication of the pairs (k, k + K/2)."""
    length, _, width = x_LHK.shape
    half = width // 2
    pairs = torch.complex(x_LHK[..., :half], x_LHK[..., half:])
    angle = torch.tensor([[p * 10_000 ** (-2 * k / width) for k in range(half)] for p in range(length)])
    spun = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)[:, None]
    return torch.cat((spun.real, spun.imag), -1)


def plain_block(weights: dict[str, Tensor], x_LD: Tensor, condition_C: Tensor) -> Tensor:
    """One sequence through one adaLN-zero block, head by head."""
    six = weights["modulation.weight"] @ F.silu(condition_C) + weights["modulation.bias"]
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = six.chunk(6)
    normed = F.layer_norm(x_LD, (WIDTH,), eps=CONFIG.norm_eps) * (1 + scale_a) + shift_a
    query, key, value = [
        (normed @ weights[f"attention.{name}.weight"].T).view(LENGTH, HEADS, WIDTH // HEADS) for name in "qkv"
    ]
    query, key = turned(query), turned(key)
    heads = []
    for h in range(HEADS):
        scores = query[:, h] @ key[:, h].T / math.sqrt(WIDTH // HEADS)
        heads.append(scores.softmax(-1) @ value[:, h])
    x_LD = x_LD + gate_a * (torch.cat(heads, -1) @ weights["attention.out.weight"].T)
    normed = F.layer_norm(x_LD, (WIDTH,), eps=CONFIG.norm_eps) * (1 + scale_f) + shift_f
    inner = normed @ weights["ffn.up.weight"].T
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return x_LD + gate_f * (inner @ weights["ffn.down.weight"].T)


@torch.no_grad()
def test_the_conditioned_dit_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Transformer(CONFIG, 11)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    weights = model.state_dict()
    tokens_BL = torch.randint(0, 11, (3, LENGTH), generator=generator)
    condition_BC = torch.randn(3, 6, generator=generator)
    found = model(tokens_BL, condition=condition_BC)
    for b in range(3):
        x_LD = weights["embed.weight"][tokens_BL[b]]
        for layer in range(2):
            prefix = f"blocks.{layer}."
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            x_LD = plain_block(own, x_LD, condition_BC[b])
        final = weights["final_modulation.weight"] @ F.silu(condition_BC[b]) + weights["final_modulation.bias"]
        shift, scale = final.chunk(2)
        expected = F.layer_norm(x_LD, (WIDTH,), eps=CONFIG.norm_eps) * (1 + scale) + shift
        assert torch.allclose(found[b], expected, atol=2e-5)


@torch.no_grad()
def test_time_is_embedded_by_sinusoids_of_a_thousand_t() -> None:
    embedding = TimeEmbedding(256)
    for layer in (embedding.inner, embedding.outer):
        layer.weight.copy_(torch.eye(256))
        layer.bias.zero_()
    for t in (0.0, 0.001, 0.3, 1.0):
        angles = [1000 * t * 10_000 ** (-k / 128) for k in range(128)]
        features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        found = embedding(torch.tensor([[t]]))
        assert found.shape == (1, 1, 256)
        assert torch.allclose(found[0, 0], F.silu(features), atol=2e-4)
