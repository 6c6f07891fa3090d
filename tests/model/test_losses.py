"""The chunked head and loss against the full-logit cross-entropy, values and gradients.

Shapes: M rows, D width, V vocabulary.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.losses import masked_linear_cross_entropy

CHUNKS = (1, 5 * 37 * 8, 1000, 2**20)


def problem(dtype: torch.dtype, rows: int = 41, width: int = 16, vocabulary: int = 37) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    head_VD = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    targets_M = torch.randint(0, vocabulary - 1, (rows,), generator=generator)
    weight_M = torch.rand(rows, generator=generator) * 4
    weight_M[-9:] = 0.0
    weight_M[3] = 0.0
    return hidden_MD.requires_grad_(), head_VD.requires_grad_(), targets_M, weight_M


def plain(
    hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, weight_M: Tensor, forbidden: int | None
) -> tuple[Tensor, Tensor]:
    logits_MV = hidden_MD @ head_VD.T
    if forbidden is not None:
        column_V = torch.arange(head_VD.shape[0]) == forbidden
        logits_MV = logits_MV.masked_fill(column_V, -torch.inf)
    ce_M = F.cross_entropy(logits_MV, targets_M, reduction="none") * (weight_M > 0)
    return (ce_M * weight_M).sum(), ce_M


def close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("forbidden", [None, 36, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_loss_and_gradients_equal_the_full_logits(
    dtype: torch.dtype, tolerance: float, forbidden: int | None, chunk_bytes: int
) -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(dtype)
    targets_M[targets_M == 5] = 6
    loss, ce_M = plain(hidden_MD, head_VD, targets_M, weight_M, forbidden)
    expected = torch.autograd.grad(2.5 * loss, (hidden_MD, head_VD))
    found, found_M = masked_linear_cross_entropy(
        hidden_MD, head_VD, targets_M, weight_M, forbidden=forbidden, chunk_bytes=chunk_bytes
    )
    gradients = torch.autograd.grad(2.5 * found, (hidden_MD, head_VD))
    close(found, loss, tolerance)
    close(found_M, ce_M.detach(), tolerance)
    assert not found_M.requires_grad
    for gradient, reference in zip(gradients, expected):
        close(gradient, reference, tolerance)


def test_gradients_agree_with_finite_differences() -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float64, rows=12, width=3, vocabulary=7)

    def loss_of(hidden: Tensor, head: Tensor) -> Tensor:
        return masked_linear_cross_entropy(hidden, head, targets_M, weight_M, forbidden=6, chunk_bytes=200)[0]

    gradients = torch.autograd.grad(loss_of(hidden_MD, head_VD), (hidden_MD, head_VD))
    step, tensors = 1e-6, (hidden_MD.detach(), head_VD.detach())
    for tensor, gradient in zip(tensors, gradients):
        for place in range(tensor.numel()):
            entry = tensor.view(-1)[place : place + 1]
            entry += step
            above = loss_of(*tensors)
            entry -= 2 * step
            below = loss_of(*tensors)
            entry += step
            assert gradient.flatten()[place].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=2e-8)


def test_forbidden_gets_no_probability_and_no_gradient() -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float32)
    loss, _ = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, weight_M, forbidden=36)
    loss.backward()
    assert head_VD.grad is not None
    assert not head_VD.grad[36].any()
    with torch.no_grad():
        every = [
            masked_linear_cross_entropy(hidden_MD, head_VD, torch.full((41,), v), torch.ones(41), forbidden=36)[1]
            for v in range(36)
        ]
    assert torch.allclose(torch.stack(every).neg().exp().sum(0), torch.ones(41), atol=1e-5)


def test_rows_without_weight_count_for_nothing() -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float64)
    short = [tensor[:-9].detach().clone() for tensor in (hidden_MD, targets_M, weight_M)]
    loss, _ = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, weight_M)
    gradients = torch.autograd.grad(loss, (hidden_MD, head_VD))
    fewer, _ = masked_linear_cross_entropy(short[0].requires_grad_(), head_VD, short[1], short[2])
    close(loss, fewer, 1e-15)
    close(gradients[1], torch.autograd.grad(fewer, head_VD)[0], 1e-14)
    assert not gradients[0][-9:].any()
    assert not gradients[0][3].any()
    nothing, _ = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, torch.zeros(41))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, head_VD)[0].any()


def test_padding_rows_may_carry_the_forbidden_token() -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float32)
    targets_M[-9:] = 36
    loss, ce_M = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, weight_M, forbidden=36)
    expected, _ = plain(hidden_MD[:-9], head_VD, targets_M[:-9], weight_M[:-9], 36)
    close(loss, expected, 1e-6)
    assert (ce_M * weight_M).isfinite().all()


def test_without_gradients_the_values_are_the_same() -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float32)
    loss, ce_M = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, weight_M, forbidden=36)
    with torch.no_grad():
        silent, silent_M = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, weight_M, forbidden=36)
    assert not silent.requires_grad
    assert torch.equal(silent, loss)
    assert torch.equal(silent_M, ce_M)
    for frozen in (hidden_MD, head_VD):
        other = head_VD if frozen is hidden_MD else hidden_MD
        expected = torch.autograd.grad(plain(hidden_MD, head_VD, targets_M, weight_M, 36)[0], other)[0]
        frozen.requires_grad_(False)
        loss, _ = masked_linear_cross_entropy(hidden_MD, head_VD, targets_M, weight_M, forbidden=36)
        close(torch.autograd.grad(loss, other)[0], expected, 1e-6)
        frozen.requires_grad_(True)


def test_large_logits_stay_finite() -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float32)
    loss, _ = masked_linear_cross_entropy(hidden_MD * 1e3, head_VD, targets_M, weight_M, forbidden=36)
    expected, _ = plain(hidden_MD * 1e3, head_VD, targets_M, weight_M, 36)
    close(loss, expected, 1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden_MD, head_VD)))


def test_a_weight_used_as_embedding_too_gets_both_gradients() -> None:
    _, table_VD, targets_M, weight_M = problem(torch.float64)
    tokens_M = torch.arange(41) % 37

    def gradient(function: Any) -> Tensor:
        hidden_MD = torch.tanh(F.embedding(tokens_M, table_VD)) * 2
        return torch.autograd.grad(function(hidden_MD, table_VD, targets_M, weight_M)[0], table_VD)[0]

    found = gradient(partial(masked_linear_cross_entropy, forbidden=36, chunk_bytes=1000))
    close(found, gradient(partial(plain, forbidden=36)), 1e-12)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_under_bf16_autocast_it_stays_near_float32(chunk_bytes: int) -> None:
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float32)
    expected = plain(hidden_MD, head_VD, targets_M, weight_M, 36)[0]
    reference = torch.autograd.grad(expected, (hidden_MD, head_VD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, ce_M = masked_linear_cross_entropy(
            hidden_MD, head_VD, targets_M, weight_M, forbidden=36, chunk_bytes=chunk_bytes
        )
    assert loss.dtype == ce_M.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for gradient, wanted in zip(torch.autograd.grad(loss, (hidden_MD, head_VD)), reference):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 1e-2 * wanted.norm()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def test_nothing_larger_than_a_chunk_is_made() -> None:
    rows, width, vocabulary, chunk_rows = 600, 8, 1000, 50
    hidden_MD, head_VD, targets_M, weight_M = problem(torch.float32, rows, width, vocabulary)
    with LargestTensor() as largest:
        loss, _ = masked_linear_cross_entropy(
            hidden_MD, head_VD, targets_M, weight_M, forbidden=999, chunk_bytes=chunk_rows * vocabulary * 4
        )
        loss.backward()
    assert largest.numel == chunk_rows * vocabulary
    with LargestTensor() as largest:
        plain(hidden_MD, head_VD, targets_M, weight_M, 999)[0].backward()
    assert largest.numel == rows * vocabulary
    assert math.prod((rows, width)) < chunk_rows * vocabulary
