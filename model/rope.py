"""Rotary positions (Su et al. 2021), in the half-split layout of Qwen2 and Llama.

Shapes: B sequences, L positions, H heads, K head width.
"""

import torch
from torch import Tensor


def rotary_tables(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, 1, K/2] in float32 for integer positions [B, L]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BL.device) / head_dim
    angles = positions_BL[..., None].float() * theta**-exponent
    return angles.cos()[:, :, None, :], angles.sin()[:, :, None, :]


def rotate(x_BLHK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns queries or keys by their position; computed in float32 at least, returned in the input's dtype."""
    cos, sin = tables
    wide_BLHK = x_BLHK.to(torch.promote_types(x_BLHK.dtype, torch.float32))
    first, second = wide_BLHK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BLHK.dtype)
