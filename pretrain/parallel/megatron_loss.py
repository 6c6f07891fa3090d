"""Megatron-core's vocab-parallel head and cross-entropy on masked rows, a chunk of their logits at a time.

Megatron's function wants the logits of all its rows at once and keeps their softmax for the backward pass. Here it sees
one chunk, and gradients are taken on the way forward, as in `masked_linear_cross_entropy`: no tensor of all rows by all
tokens ever exists.

Shapes: M rows, D width, V the vocabulary's local part, R rows of a chunk.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.losses import CHUNK_BYTES, VocabularySlice


def vocab_parallel_linear_cross_entropy(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets_M: Tensor,
    weight_M: Tensor,
    *,
    forbidden: int | None = None,
    part: VocabularySlice | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """What masked_linear_cross_entropy computes, by Megatron's functions; its group is that of the parallel state.

    Args:
        hidden_MD: hidden states of the rows, the same on every process.
        head_VD: this process's rows of the head; the last process may have fewer.
        targets_M: global token ids.
        weight_M: weights; rows of weight 0 are padding.
        forbidden: global id that can not be predicted.
        part: where the rows of the head lie; Megatron's always have a place.
        chunk_bytes: size of a chunk's float32 logits.
    """
    assert part is not None
    device = hidden_MD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_MD, head_VD = hidden_MD.to(dtype), head_VD.to(dtype)
    if not torch.is_grad_enabled():
        hidden_MD, head_VD = hidden_MD.detach(), head_VD.detach()
    with torch.autocast(device, enabled=False):
        return _InChunks.apply(hidden_MD, head_VD, targets_M, weight_M, forbidden, part, chunk_bytes)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden_MD, head_VD, targets_M, weight_M, forbidden, part, chunk_bytes
    ):
        differentiated = any(ctx.needs_input_grad)
        grad_hidden_MD = torch.empty_like(hidden_MD) if differentiated else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if differentiated else None
        ce_M = torch.empty_like(weight_M, dtype=torch.float32)
        rows = max(1, chunk_bytes // (_columns(part) * ce_M.itemsize))
        for start in range(0, hidden_MD.shape[0], rows):
            chunk = slice(start, start + rows)
            hidden_RD = hidden_MD[chunk].detach().requires_grad_(differentiated)
            own_VD = head_VD.detach().requires_grad_(differentiated)
            with torch.enable_grad():
                ce_R = _cross_entropy(hidden_RD, own_VD, targets_M[chunk], forbidden, part)
            ce_M[chunk] = ce_R.detach()
            if grad_hidden_MD is not None and grad_head_VD is not None:
                of_hidden_RD, of_head_VD = torch.autograd.grad(ce_R, (hidden_RD, own_VD), weight_M[chunk].float())
                grad_hidden_MD[chunk] = of_hidden_RD
                grad_head_VD.add_(of_head_VD)
        ctx.grads = grad_hidden_MD, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)
        ce_M.masked_fill_(weight_M == 0, 0.0)  # padding may carry any token, the forbidden one too
        ctx.mark_non_differentiable(ce_M)
        return (ce_M * weight_M).sum(), ce_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_ce: Tensor):  # type: ignore[no-untyped-def]
        hidden, head = ctx.grads
        ctx.grads = None
        return hidden.mul_(grad_loss.to(hidden.dtype)), head.mul_(grad_loss.to(head.dtype)), *(None,) * 5


def _cross_entropy(
    hidden_RD: Tensor, head_VD: Tensor, targets_R: Tensor, forbidden: int | None, part: VocabularySlice
) -> Tensor:
    """Cross-entropies [R] of one chunk; the gradient of its hidden states is summed over the processes."""
    logits_RV = linear_with_grad_accumulation_and_async_allreduce(
        hidden_RD,
        head_VD,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=part.group.size() > 1,
        sequence_parallel=False,
        tp_group=part.group,
    )
    logits_RV = F.pad(logits_RV, (0, _columns(part) - head_VD.shape[0]), value=-torch.inf)
    if forbidden is not None and part.first <= forbidden < part.first + head_VD.shape[0]:
        logits_RV[:, forbidden - part.first] = -torch.inf
    ce_R: Tensor = vocab_parallel_cross_entropy(logits_RV, targets_R)
    return ce_R


def _columns(part: VocabularySlice) -> int:
    """Tokens of every part but the last: Megatron takes all parts to be of one size."""
    return -(-part.total // part.group.size())
