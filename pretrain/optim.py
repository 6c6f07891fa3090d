"""AdamW with decay groups; its state exists from the start, so loading a checkpoint needs no dummy step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW: matrices decay; norms, biases and other vectors do not."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def optimizer_step(optimizer: torch.optim.AdamW, *, lr: float, take: Tensor) -> None:
    """One update, or none where `take` is 0; decided on the device, without a synchronisation."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (1.0 - take).reshape(())  # type: ignore[attr-defined]
    optimizer.step()
