"""Activation checkpointing: what a block computed is computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.attention.varlen  # registers its operator
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

Recompute = Literal["none", "selective", "full"]

_DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""Products, attention and sums over processes: nearly all of the time, and not the most of the memory."""


def recomputed(block: Callable[..., Tensor], recompute: Recompute) -> Callable[..., Tensor]:
    """The block, keeping everything (none), only its products (selective), or only its inputs (full)."""
    if recompute == "none":
        return block
    contexts = _keep_the_dear if recompute == "selective" else noop_context_fn
    return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep_the_dear():  # type: ignore[no-untyped-def]
    def policy(context, operator, *args, **kwargs):  # type: ignore[no-untyped-def]
        return CheckpointPolicy.MUST_SAVE if operator in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
