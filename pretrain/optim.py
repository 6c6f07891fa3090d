"""AdamW with decay groups; its state exists from the start, so loading a checkpoint needs no dummy step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that need a gradient: matrices decay; norms, biases and other vectors do not."""
    parameters = [p for p in parameters if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    optimizer = adamw(matrices, vectors, config)
    allocate_state(optimizer, parameters)
    return optimizer


def adamw(matrices: list[nn.Parameter], vectors: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW without its state, for who keeps weights elsewhere than in these parameters."""
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def allocate_state(optimizer: torch.optim.AdamW, weights: Iterable[Tensor]) -> None:
    """Moments of zero and no update yet for every tensor that the optimizer will step."""
    for weight in weights:
        moments = {name: torch.zeros_like(weight, requires_grad=False) for name in MOMENTS}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}


def optimizer_step(optimizer: torch.optim.AdamW, *, lr: float, take: Tensor) -> None:
    """One update, or none where `take` is 0; decided on the device, without a synchronisation."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (1.0 - take).reshape(())  # type: ignore[attr-defined]
    optimizer.step()
