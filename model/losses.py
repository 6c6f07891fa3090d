"""Masked linear cross-entropy: head and loss on masked rows only, in chunks, gradients taken on the way forward.

No tensor of size [rows, vocabulary] outlives a chunk, and nothing is recomputed in the backward pass, which only
scales the gradients that the forward pass has already summed.

Shapes: M rows, D width, V vocabulary (the local part of it under a vocab-parallel group), R rows of a chunk.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 96 * 2**20


@dataclass(frozen=True)
class VocabularySlice:
    """The part of the vocabulary that this rank's head holds.

    Args:
        group: the ranks that share the vocabulary.
        first: global id of the slice's first token.
        total: size of the whole vocabulary.
    """

    group: dist.ProcessGroup
    first: int
    total: int


class LinearCrossEntropy(Protocol):
    """Head and cross-entropy in one, without the logits of all rows; an engine may bring its own."""

    def __call__(
        self,
        hidden_MD: Tensor,
        head_VD: Tensor,
        targets_M: Tensor,
        weight_M: Tensor,
        *,
        forbidden: int | None = None,
        part: VocabularySlice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See masked_linear_cross_entropy."""


def masked_linear_cross_entropy(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets_M: Tensor,
    weight_M: Tensor,
    *,
    forbidden: int | None = None,
    part: VocabularySlice | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies (a differentiable scalar, float32) and each row's own [M] (detached, nats).

    Args:
        hidden_MD: hidden states of the rows, any float dtype.
        head_VD: the head's matrix in the same dtype, or this rank's contiguous slice of it.
        targets_M: global token ids.
        weight_M: weights; rows of weight 0 are padding: their cross-entropy is returned as 0.
        forbidden: global id that can not be predicted (the mask), its logit taken as minus infinity.
        part: where that slice lies, when the vocabulary is split over ranks.
        chunk_bytes: size of the largest temporary.
    """
    device = hidden_MD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_MD, head_VD = hidden_MD.to(dtype), head_VD.to(dtype)
    if not torch.is_grad_enabled():
        hidden_MD, head_VD = hidden_MD.detach(), head_VD.detach()
    with torch.autocast(device, enabled=False):
        return _MaskedLinearCrossEntropy.apply(hidden_MD, head_VD, targets_M, weight_M, forbidden, part, chunk_bytes)


class _MaskedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden_MD, head_VD, targets_M, weight_M, forbidden, part, chunk_bytes
    ):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        wide = torch.promote_types(torch.float32, hidden_MD.dtype)
        num_local = head_VD.shape[0]
        group, first, total = (None, 0, num_local) if part is None else (part.group, part.first, part.total)
        grad_hidden_MD = torch.empty_like(hidden_MD) if need_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=wide) if need_head else None
        ce_M = torch.empty_like(weight_M, dtype=wide)
        largest_slice = -(-total // (1 if group is None else group.size()))
        rows = max(1, chunk_bytes // (largest_slice * wide.itemsize))  # the same on every rank
        for start in range(0, hidden_MD.shape[0], rows):
            chunk = slice(start, start + rows)
            hidden_RD, weight_R = hidden_MD[chunk], weight_M[chunk].to(wide)
            logits_RV = (hidden_RD @ head_VD.T).to(wide)
            if forbidden is not None and first <= forbidden < first + num_local:
                logits_RV[:, forbidden - first] = -torch.inf
            target_R, owned_R = _local_target(targets_M[chunk], first, num_local)
            ce_M[chunk], total_R = _exponentiate(logits_RV, target_R, owned_R, group)
            if grad_hidden_MD is None and grad_head_VD is None:
                continue
            logits_RV.mul_((weight_R / total_R)[:, None])
            logits_RV.scatter_add_(1, target_R[:, None], (-weight_R * owned_R)[:, None])
            grad_RV = logits_RV.to(hidden_MD.dtype)
            if grad_hidden_MD is not None:
                grad_hidden_MD[chunk] = grad_RV @ head_VD
            if grad_head_VD is not None:
                _accumulate(grad_head_VD, grad_RV, hidden_RD)
        if group is not None and grad_hidden_MD is not None:
            dist.all_reduce(grad_hidden_MD, group=group)
        ctx.grads = grad_hidden_MD, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)
        ce_M.masked_fill_(weight_M == 0, 0.0)  # padding may carry any token, the forbidden one too
        ctx.mark_non_differentiable(ce_M)
        return (ce_M * weight_M).sum(), ce_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_ce: Tensor):  # type: ignore[no-untyped-def]
        hidden, head = ctx.grads
        ctx.grads = None
        return (
            None if hidden is None else hidden.mul_(grad_loss.to(hidden.dtype)),
            None if head is None else head.mul_(grad_loss.to(head.dtype)),
            *(None,) * 5,
        )


def _local_target(targets_R: Tensor, first: int, num_local: int) -> tuple[Tensor, Tensor]:
    """Targets as columns of the local slice (clamped), and whether the slice holds them."""
    local_R = targets_R - first
    owned_R = (local_R >= 0) & (local_R < num_local)
    return local_R.clamp(0, num_local - 1), owned_R


def _exponentiate(
    logits_RV: Tensor, target_R: Tensor, owned_R: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Turns logits into exp(logit - max) in place; returns the cross-entropies and the exponentials' sums."""
    top_R = logits_RV.amax(1)
    if group is not None:
        dist.all_reduce(top_R, dist.ReduceOp.MAX, group=group)
    logits_RV.sub_(top_R[:, None])
    target_logit_R = torch.where(owned_R, logits_RV.gather(1, target_R[:, None])[:, 0], 0.0)
    total_R = logits_RV.exp_().sum(1)
    if group is not None:
        both = torch.stack((total_R, target_logit_R))
        dist.all_reduce(both, group=group)
        total_R, target_logit_R = both.unbind()
    return total_R.log() - target_logit_R, total_R


def _accumulate(grad_head_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor) -> None:
    if grad_head_VD.dtype == hidden_RD.dtype:
        grad_head_VD.addmm_(grad_RV.T, hidden_RD)
    else:
        grad_head_VD.add_(grad_RV.T @ hidden_RD)
