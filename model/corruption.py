"""The forward process: mask schedules, and the pure function that turns a clean batch into a corrupted one.

Shapes: B sequences, L positions, M masked rows (padded to a multiple of 128).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from .batch import Batch
from .config import ModelConfig, ScheduleConfig
from .noise import NoiseKey

ROW_MULTIPLE = 128


@dataclass(frozen=True)
class MaskSchedule:
    """alpha(t), its weight and its inverse, in float64."""

    config: ScheduleConfig

    def alpha(self, t: Tensor) -> Tensor:
        """Probability of being unmasked at time t."""
        c, t = self.config, t.double()
        if c.kind == "linear":
            return 1.0 - t
        if c.kind == "cosine":
            return 1.0 - torch.cos(0.5 * math.pi * (1.0 - t))
        if c.kind == "polynomial":
            return 1.0 - t**c.power
        return torch.exp(-self._total_noise(t))

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -alpha'(t) / (1 - alpha(t)), the weight of the cross-entropy in the bound (VADD Eq. 3)."""
        c, t = self.config, t.double()
        if c.kind == "linear":
            return 1.0 / t
        if c.kind == "cosine":
            return 0.5 * math.pi * torch.tan(0.5 * math.pi * (1.0 - t))
        if c.kind == "polynomial":
            return c.power / t
        noise = self._total_noise(t)
        return noise * math.log(c.beta_max / c.beta_min) / torch.expm1(noise)

    def time(self, alpha: Tensor) -> Tensor:
        """The t in [0, 1] at which alpha(t) has this value."""
        c, alpha = self.config, alpha.double()
        if c.kind == "linear":
            t = 1.0 - alpha
        elif c.kind == "cosine":
            t = 1.0 - torch.acos(1.0 - alpha) * (2.0 / math.pi)
        elif c.kind == "polynomial":
            t = (1.0 - alpha) ** (1.0 / c.power)
        else:
            t = torch.log(-torch.log(alpha) / c.beta_min) / math.log(c.beta_max / c.beta_min)
        return t.clamp(0.0, 1.0)

    def _total_noise(self, t: Tensor) -> Tensor:
        return self.config.beta_min ** (1.0 - t) * self.config.beta_max**t


@dataclass(frozen=True)
class Corruption:
    """A corrupted batch, and the rows on which the head must run.

    Args:
        x_t_BL: tokens with the masked ones replaced by the mask id.
        masked_BL: where.
        t_B: time of each sequence, float64.
        rows_M: indices into the flattened [B * L] positions, padded with row 0.
        targets_M: the clean token at each row.
        weight_M: float32 weight of each row's cross-entropy; 0 for padding rows.
        num_masked: how many rows are real.
        num_maskable: how many positions the bound counts.
        divisor: what the loss's sum is divided by, before the sum over ranks: one of the two counts.
        key: the noise key, from which later draws (dropout, latents) also come.
    """

    x_t_BL: Tensor
    masked_BL: Tensor
    t_B: Tensor
    rows_M: Tensor
    targets_M: Tensor
    weight_M: Tensor
    num_masked: int
    num_maskable: int
    divisor: int
    key: NoiseKey

    def to(self, device: torch.device) -> Self:
        """The same corruption on another device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor | NoiseKey) else v for k, v in vars(self).items()
        }
        return type(self)(**moved)


def corrupt(batch: Batch, key: NoiseKey, settings: ModelConfig) -> Corruption:
    """Masks each maskable position with probability 1 - alpha(t), t stratified over the global batch.

    A pure function without parameters: the same key gives the same bits however the batch is split.
    """
    schedule = MaskSchedule(settings.schedule)
    t_min = settings.schedule.t_min
    t_B = t_min + (1.0 - t_min) * key.stratified()
    hide_B = 1.0 - schedule.alpha(t_B)
    masked_BL = key.stream("mask").below(hide_B[:, None].expand(batch.tokens_BL.shape)) & batch.maskable_BL
    weight_B = schedule.weight(t_B) if settings.loss_weight == "elbo" else torch.ones_like(t_B)
    return _gather(batch, key, settings, masked_BL, t_B, weight_B)


def corrupt_uniform_count(batch: Batch, key: NoiseKey, settings: ModelConfig) -> Corruption:
    """Masks n positions of each row, n uniform on 1..N, weighted N / n: the likelihood bound without a t_min.

    The n positions with the smallest uniform draws are masked; the n-th smallest is distributed as
    Beta(n, N - n + 1) independently of which they are, and serves as 1 - alpha(t) for time conditioning.
    """
    draws_BL = key.stream("subset").uniform(batch.tokens_BL.shape[1]).masked_fill(~batch.maskable_BL, torch.inf)
    total_B = batch.maskable_BL.sum(1)
    count_B = (key.stratified("count") * total_B).long() + (total_B > 0)
    ordered_BL = draws_BL.sort(dim=1).values
    last_B = ordered_BL.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
    masked_BL = (draws_BL <= last_B[:, None]) & batch.maskable_BL
    t_B = MaskSchedule(settings.schedule).time(1.0 - torch.where(total_B > 0, last_B, 0.5))
    weight_B = total_B.double() / count_B.clamp(min=1)
    return _gather(batch, key, settings, masked_BL, t_B, weight_B, divisor="maskable")


def _gather(
    batch: Batch,
    key: NoiseKey,
    settings: ModelConfig,
    masked_BL: Tensor,
    t_B: Tensor,
    weight_B: Tensor,
    divisor: Literal["maskable", "masked"] | None = None,
) -> Corruption:
    rows = masked_BL.flatten().nonzero()[:, 0]
    num_masked, length = rows.numel(), masked_BL.shape[1]
    size = max(1, -(-num_masked // ROW_MULTIPLE)) * ROW_MULTIPLE
    rows_M = rows.new_zeros(size)
    rows_M[:num_masked] = rows
    weight_M = torch.zeros(size, device=rows.device)
    weight_M[:num_masked] = weight_B[rows // length].float()
    num_maskable = int(batch.maskable_BL.sum())
    counts = {"maskable": num_maskable, "masked": num_masked}
    return Corruption(
        x_t_BL=batch.tokens_BL.masked_fill(masked_BL, settings.mask_id),
        masked_BL=masked_BL,
        t_B=t_B,
        rows_M=rows_M,
        targets_M=batch.tokens_BL.flatten()[rows_M],
        weight_M=weight_M,
        num_masked=num_masked,
        num_maskable=num_maskable,
        divisor=counts[divisor or settings.normalize_by],
        key=key,
    )
