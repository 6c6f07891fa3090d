"""How large a model is, and the control that is as large: parameters without the latent that they served."""

from dataclasses import replace

import torch

from .config import ModelConfig, PointMlpConfig
from .diffusion import MaskedDiffusion


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a model, the recognition network included."""
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedDiffusion(config).parameters())


def matched_control(config: ModelConfig) -> ModelConfig:
    """The model without latent that has as many parameters as model and recognition network together, or a few more.

    As many layers as needed are added to the denoiser; a latent's conditioning path goes with the latent.
    """
    target = num_parameters(config)
    backbone = config.backbone
    if not isinstance(backbone, PointMlpConfig) and not config.time_conditioning:
        backbone = replace(backbone, condition_dim=0)
    control = replace(config, latent=None, backbone=backbone)
    deeper = replace(control, backbone=replace(control.backbone, num_layers=control.backbone.num_layers + 1))
    here = num_parameters(control)
    missing = -(-(target - here) // (num_parameters(deeper) - here))
    return replace(
        control, backbone=replace(control.backbone, num_layers=control.backbone.num_layers + max(0, missing))
    )
