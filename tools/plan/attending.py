"""Attention as on a GPU that is not there: what is chosen, what is refused, and what its kernels keep.

The numbers are nowhere; where they would be, on the CPU, has no such kernels, so each of them has a stand-in that
allocates what it would. SDPA's own for the CPU keeps what those for a GPU keep: its output and a log-sum-exp.

Shapes: B sequences, L positions, Q queries, S keys, H query heads, G key/value heads, K head width, N segments.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import attention, flash, sdpa, transformer
from model.masks import MaskSpec
from model.sequence import SequencePart

GPU = torch.device("cuda")
TILE = 128
"""Queries and keys of a tile of FlexAttention's block mask."""


@contextmanager
def attending_on_gpu() -> Iterator[dict[str, str]]:
    """Attention chooses, refuses and allocates as on a GPU; gives the kernel of every mask that is asked for."""
    kernels: dict[str, str] = {}
    refuse_unexpressible = attention.refuse_unexpressible

    def noting(name: attention.BackendName, mask: MaskSpec, part: SequencePart | None = None) -> None:
        refuse_unexpressible(name, mask, part)
        kernels[" ".join(mask.kinds)] = name

    choose, refuse_device = attention.choose, attention.refuse_device
    on_gpu: list[tuple[Any, str, Callable[..., Any]]] = [
        (attention, "choose", lambda mask, _, dtype, part=None: choose(mask, GPU, dtype, part)),
        (attention, "computing_dtype", lambda _, dtype: dtype),
        (attention, "refuse_unexpressible", noting),
        (attention, "flash_kernel", lambda: flash.varlen),
        (attention, "FlexPlan", _FlexPlan),
        (flash, "document_segments", _segments),
        (sdpa, "shares_key_heads", lambda _: False),
        *((place, "refuse_device", partial(_refuse, refuse_device)) for place in (attention, transformer)),
    ]
    with ExitStack() as stack:
        for place, name, stand_in in on_gpu:
            stack.enter_context(patch.object(place, name, stand_in))
        yield kernels


def _refuse(refuse_device: Callable[..., None], name: str, _: torch.device, *, training: bool) -> None:
    refuse_device(name, GPU, training=training)


def _segments(document_BL: Tensor) -> tuple[Tensor, int]:
    """As if every row were one document: where documents lie changes no kernel's memory."""
    num_rows, length = document_BL.shape
    return torch.empty(num_rows + 1, dtype=torch.int32, device=document_BL.device), length


@dataclass(frozen=True)
class _FlexPlan:
    """In the place of FlexPlan: the tiles [4, B or 1, Q, S], of which a mask lists the full and the partial ones twice.

    By queries for the forward pass, by keys for the backward pass.
    """

    tiles: Tensor

    @classmethod
    def of(cls, mask: MaskSpec, num_queries: int, num_cached: int, device: torch.device) -> "_FlexPlan":
        num_rows = 1 if mask.document_BL is None else mask.document_BL.shape[0]
        tiles = [-(-positions // TILE) for positions in (num_queries, num_cached + num_queries)]
        return cls(torch.empty(4, num_rows, *tiles, dtype=torch.int32, device=device))

    def attend(self, query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor) -> Tensor:
        out_BQHK: Tensor = _FlexKernel.apply(query_BQHK, key_BSGK, value_BSGK)
        return out_BQHK


class _FlexKernel(torch.autograd.Function):
    """What FlexAttention's kernels allocate: no scores."""

    @staticmethod
    def forward(ctx: Any, query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor) -> Tensor:
        out_BQHK = torch.empty_like(query_BQHK)
        logsumexp_BQH = query_BQHK.new_empty(query_BQHK.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query_BQHK, key_BSGK, value_BSGK, out_BQHK, logsumexp_BQH)
        return out_BQHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BQHK: Tensor) -> tuple[Tensor, ...]:
        *inputs, _, logsumexp_BQH = ctx.saved_tensors
        delta_BQH = torch.empty_like(logsumexp_BQH)  # held while the gradients are made
        gradients = tuple(map(torch.empty_like, inputs))
        del delta_BQH
        return gradients
