"""Initial weights as a function of (seed, parameter name, element): the same at any sharding, from the meta device.

Rules are a table from name to distribution, read top to bottom.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .noise import normal_at, stream_key

HEAD_DEVIATION = 0.02
CHUNK = 1 << 22
Opened = Callable[[nn.Parameter], AbstractContextManager[Tensor]]

RULES: tuple[tuple[str, str], ...] = (
    (r"projection\.weight$", "first_half"),  # a concatenation starts as its first part
    (r"(log_std\.weight|gate)$", "zeros"),
    (r"mark\.weight$", "unit"),
    (r"modulation\.(weight|bias)$", "zeros"),  # adaLN-zero: every block starts as the identity
    (r"norm\.weight$", "ones"),
    (r"bias$", "zeros"),
    (r"(attention\.out|ffn\.down)\.weight$", "residual"),
    (r"(embed|place)\.weight$", "embedding"),
    (r"head\.weight$", "head"),
    (r"weight$", "normal"),
)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, *, num_layers: int, opened: Opened = nullcontext) -> None:
    """Fills every parameter of `model` (plain or sharded as DTensors) in place.

    Matrices keep the variance of what they multiply (1 / fan-in), those that write into the residual stream share it
    among the layers (GPT-2). Token embeddings have unit variance, so that tokens outweigh what untrained blocks add to
    them; a head, tied or not, starts small.

    Args:
        num_layers: number of blocks, each of which writes into the residual stream twice.
        opened: a context with the tensor to fill in a parameter's stead, for who keeps the weights elsewhere.
    """
    tied = not any(name.endswith("head.weight") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        rule = next(kind for pattern, kind in RULES if re.search(pattern, name))
        with opened(parameter) as weight:
            _fill(weight, rule, stream_key(seed, f"initial/{name}"), tied=tied, num_layers=num_layers)


def _fill(weight: Tensor, rule: str, key: int, *, tied: bool, num_layers: int) -> None:
    """Draws a weight by its rule."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if rule in ("ones", "zeros"):
        local.fill_(1.0 if rule == "ones" else 0.0)
    elif rule == "first_half":
        _fill_identity(local, weight)
    else:
        spread = 1.0 / math.sqrt(weight.shape[1])
        scale = {
            "normal": spread,
            "residual": spread / math.sqrt(2 * num_layers),
            "embedding": HEAD_DEVIATION if tied else 1.0,
            "head": HEAD_DEVIATION,
            "unit": 1.0,
        }[rule]
        _fill_normal(local, weight, key, scale)


def _offset(parameter: Tensor) -> Sequence[int]:
    """Where the local part of a parameter begins."""
    if not isinstance(parameter, DTensor):
        return [0] * parameter.dim()
    return compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)[1]


def _fill_identity(local: Tensor, parameter: Tensor) -> None:
    """Ones on the diagonal of a matrix [rows, columns], zeros elsewhere."""
    rows, columns = (torch.arange(n, device=local.device) + start for n, start in zip(local.shape, _offset(parameter)))
    local.copy_(rows[:, None] == columns)


def _fill_normal(local: Tensor, parameter: Tensor, key: int, scale: float) -> None:
    """Draws the local part of a parameter, a slab of rows at a time."""
    offset = _offset(parameter)
    if not local.numel():
        return
    width = parameter.shape[1:].numel()
    columns = torch.arange(local[0].numel(), device=local.device)
    if local.dim() == 2:
        columns = columns + offset[1]
    step = max(1, CHUNK // columns.numel())
    for start in range(0, local.shape[0], step):
        slab = local[start : start + step]
        rows = torch.arange(start, start + slab.shape[0], device=local.device) + offset[0]
        index = rows[:, None] * width + columns
        slab.copy_(normal_at(key, index).view(slab.shape) * scale)
