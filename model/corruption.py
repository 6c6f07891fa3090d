"""The forward process: mask schedules, and the pure function that turns a clean batch into a corrupted one.

Shapes: B sequences, L positions, S segments with a time of their own, M masked rows (padded to a multiple of 128).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

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
        t_BS: times, float64, of the S segments of each sequence; S = 1 is one time per sequence.
        rows_M: indices into the flattened [B * L] positions, ascending, padded with row 0.
        sequence_M: the sequence of each row.
        targets_M: the clean token at each row.
        weight_M: float32 weight of each row's cross-entropy; 0 for padding rows.
        weight_BS: float32 weight of each segment, in which its KL counts too.
        maskable_B: positions of each sequence that the bound counts.
        num_masked: how many rows are real.
        normalize_by: which of the two counts divides the summed loss.
        key: the noise key, from which later draws (dropout, latents) also come.
    """

    x_t_BL: Tensor
    masked_BL: Tensor
    t_BS: Tensor
    rows_M: Tensor
    sequence_M: Tensor
    targets_M: Tensor
    weight_M: Tensor
    weight_BS: Tensor
    maskable_B: Tensor
    num_masked: int
    normalize_by: Literal["maskable", "masked"]
    key: NoiseKey

    @property
    def num_segments(self) -> int:
        """S."""
        return self.t_BS.shape[1]

    @property
    def hidden_BS(self) -> Tensor:
        """Segments in which something is masked, bool: only there does a latent cost anything."""
        return self.masked_BL.unflatten(1, (self.num_segments, -1)).any(2)

    def segment_of(self, rows_M: Tensor) -> Tensor:
        """The segment of each row of the flattened positions."""
        length = self.masked_BL.shape[1]
        return rows_M % length // (length // self.num_segments)

    @property
    def num_maskable(self) -> int:
        """Positions that the bound counts."""
        return int(self.maskable_B.sum())

    @property
    def divisor(self) -> int:
        """What the summed loss is divided by, once summed over micro-batches and ranks."""
        return self.num_maskable if self.normalize_by == "maskable" else self.num_masked

    def rows(self, start: int, stop: int) -> Self:
        """The corruption of the sequences start..stop, as if they alone had been corrupted."""
        length = self.masked_BL.shape[1]
        edges = torch.tensor([start * length, stop * length], device=self.rows_M.device)
        first, last = torch.searchsorted(self.rows_M[: self.num_masked], edges).tolist()
        return replace(
            self._with_rows(first, last, first_sequence=start),
            x_t_BL=self.x_t_BL[start:stop],
            masked_BL=self.masked_BL[start:stop],
            t_BS=self.t_BS[start:stop],
            weight_BS=self.weight_BS[start:stop],
            maskable_B=self.maskable_B[start:stop],
            key=self.key.rows(start, stop),
        )

    def _with_rows(self, first: int, last: int, *, first_sequence: int = 0) -> Self:
        """With these of the masked rows alone, numbered from a sequence on."""
        rows_M, sequence_M, targets_M, weight_M = _pad(
            self.rows_M[first:last] - first_sequence * self.masked_BL.shape[1],
            self.sequence_M[first:last] - first_sequence,
            self.targets_M[first:last],
            self.weight_M[first:last],
        )
        return replace(
            self,
            rows_M=rows_M,
            sequence_M=sequence_M,
            targets_M=targets_M,
            weight_M=weight_M,
            num_masked=last - first,
        )

    def share_of_rows(self, rank: int, size: int) -> Self:
        """The same corruption with a part of its masked rows, which `size` processes divide among them."""
        first, last = (self.num_masked * n // size for n in (rank, rank + 1))
        return self._with_rows(first, last)

    def repeated(self, times: int) -> Self:
        """The corruption of the sequences that many times over, [times * B]."""
        real, copy_N1 = slice(0, self.num_masked), torch.arange(times, device=self.rows_M.device)[:, None]
        rows_M, sequence_M, targets_M, weight_M = _pad(
            (self.rows_M[real] + copy_N1 * self.masked_BL.numel()).flatten(),
            (self.sequence_M[real] + copy_N1 * self.masked_BL.shape[0]).flatten(),
            self.targets_M[real].repeat(times),
            self.weight_M[real].repeat(times),
        )
        return replace(
            self,
            x_t_BL=self.x_t_BL.repeat(times, 1),
            masked_BL=self.masked_BL.repeat(times, 1),
            t_BS=self.t_BS.repeat(times, 1),
            rows_M=rows_M,
            sequence_M=sequence_M,
            targets_M=targets_M,
            weight_M=weight_M,
            weight_BS=self.weight_BS.repeat(times, 1),
            maskable_B=self.maskable_B.repeat(times),
            num_masked=times * self.num_masked,
            key=replace(self.key, index_B=self.key.index_B.repeat(times)),
        )

    def of_rows(self, values_BS: Tensor) -> Tensor:
        """What stands at the segment of each masked row [M]."""
        return values_BS[self.sequence_M, self.segment_of(self.rows_M)]

    def by_segment(self, values_M: Tensor) -> Tensor:
        """Sums [..., B, S] of values [..., M] of the masked rows; of padding none, or zeros."""
        num_sequences, num_segments = self.t_BS.shape
        place_M = self.sequence_M * num_segments + self.segment_of(self.rows_M)
        sums = values_M.new_zeros(*values_M.shape[:-1], num_sequences * num_segments)
        return sums.index_add_(-1, place_M[: values_M.shape[-1]], values_M).unflatten(-1, (num_sequences, num_segments))

    def weighed(self, factor_BS: Tensor) -> Self:
        """The same with the weights of each segment multiplied."""
        return replace(self, weight_M=self.weight_M * self.of_rows(factor_BS), weight_BS=self.weight_BS * factor_BS)

    def to(self, device: torch.device) -> Self:
        """The same corruption on another device, without waiting for the copies."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same corruption in page-locked memory, from which copies to a GPU need no wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed, key=replace(self.key, index_B=function(self.key.index_B)))


def corrupt(batch: Batch, key: NoiseKey, settings: ModelConfig) -> Corruption:
    """Masks each maskable position with probability 1 - alpha(t), t stratified over the global batch.

    Each segment (the sequence, or a block) has a time of its own. A pure function without parameters: the same key
    gives the same bits however the batch is split.
    """
    if settings.autoregressive:
        return _next_tokens(batch, key, settings)
    schedule = MaskSchedule(settings.schedule)
    t_min, t_max = settings.schedule.t_min, settings.schedule.t_max
    length = batch.tokens_BL.shape[1]
    t_BS = t_min + (t_max - t_min) * key.stratified(num_segments=settings.num_segments(length))
    hide_BL = _spread(1.0 - schedule.alpha(t_BS), length)
    masked_BL = key.stream("mask").below(hide_BL) & batch.maskable_BL
    weight_BS = schedule.weight(t_BS) if settings.loss_weight == "elbo" else torch.ones_like(t_BS)
    return build_corruption(batch, key, settings.mask_id, masked_BL, t_BS, weight_BS, settings.normalize_by)


def corrupt_uniform_count(batch: Batch, key: NoiseKey, settings: ModelConfig) -> Corruption:
    """Masks n positions of each segment, n uniform on 1..N, weighted N / n: the bound without a t_min.

    The n positions with the smallest uniform draws are masked; the n-th smallest is distributed as
    Beta(n, N - n + 1) independently of which they are, and serves as 1 - alpha(t) for time conditioning.
    """
    if settings.autoregressive:
        return _next_tokens(batch, key, settings)
    length = batch.tokens_BL.shape[1]
    num_segments = settings.num_segments(length)
    draws_BL = key.stream("subset").uniform(length).masked_fill(~batch.maskable_BL, torch.inf)
    total_BS = batch.maskable_BL.unflatten(1, (num_segments, -1)).sum(2)
    count_BS = (key.stratified("count", num_segments) * total_BS).long() + (total_BS > 0)
    ordered_BSR = draws_BL.unflatten(1, (num_segments, -1)).sort(dim=2).values
    last_BS = ordered_BSR.gather(2, (count_BS - 1).clamp(min=0)[:, :, None])[:, :, 0]
    masked_BL = (draws_BL <= _spread(last_BS, length)) & batch.maskable_BL
    t_BS = MaskSchedule(settings.schedule).time(1.0 - torch.where(total_BS > 0, last_BS, 0.5))
    weight_BS = total_BS.double() / count_BS.clamp(min=1)
    return build_corruption(batch, key, settings.mask_id, masked_BL, t_BS, weight_BS, "maskable")


def shift_right(tokens_BL: Tensor, positions_BL: Tensor, start_id: int) -> Tensor:
    """Each token moved to the place after its own; documents (position 0) begin with `start_id`."""
    return F.pad(tokens_BL[:, :-1], (1, 0), value=start_id).masked_fill(positions_BL == 0, start_id)


def _next_tokens(batch: Batch, key: NoiseKey, settings: ModelConfig) -> Corruption:
    """Next-token prediction: the input is shifted behind a start token, and every maskable position counts."""
    ones_B1 = torch.ones(batch.num_sequences, 1, dtype=torch.float64, device=batch.tokens_BL.device)
    whole = build_corruption(batch, key, settings.mask_id, batch.maskable_BL, ones_B1, ones_B1, settings.normalize_by)
    return replace(whole, x_t_BL=shift_right(batch.tokens_BL, batch.positions_BL, settings.mask_id))


def _spread(values_BS: Tensor, length: int) -> Tensor:
    """Each segment's value at all of its positions [B, L]."""
    return values_BS.repeat_interleave(length // values_BS.shape[1], dim=1)


def build_corruption(
    batch: Batch,
    key: NoiseKey,
    mask_id: int,
    masked_BL: Tensor,
    t_BS: Tensor,
    weight_BS: Tensor,
    normalize_by: Literal["maskable", "masked"],
) -> Corruption:
    rows = masked_BL.flatten().nonzero()[:, 0]
    length = masked_BL.shape[1]
    sequence, segment = rows // length, rows % length // (length // t_BS.shape[1])
    weight_BS = weight_BS.float()
    rows_M, sequence_M, targets_M, weight_M = _pad(
        rows, sequence, batch.tokens_BL.flatten()[rows], weight_BS[sequence, segment]
    )
    return Corruption(
        x_t_BL=batch.tokens_BL.masked_fill(masked_BL, mask_id),
        masked_BL=masked_BL,
        t_BS=t_BS,
        rows_M=rows_M,
        sequence_M=sequence_M,
        targets_M=targets_M,
        weight_M=weight_M,
        weight_BS=weight_BS,
        maskable_B=batch.maskable_BL.sum(1),
        num_masked=rows.numel(),
        normalize_by=normalize_by,
        key=key,
    )


def _pad(*rows: Tensor) -> list[Tensor]:
    """Lengthens each with zeros to the next multiple of 128, at least one: the head always runs, in few shapes."""
    missing = -rows[0].numel() % ROW_MULTIPLE or (ROW_MULTIPLE if rows[0].numel() == 0 else 0)
    return [F.pad(row, (0, missing)) for row in rows]
