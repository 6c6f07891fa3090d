"""flash-attn's plans with a reference in the kernel's place: what is laid end to end, and what comes back.

Shapes: B sequences, L positions, Q queries, S keys, H query heads, G key/value heads, K head width, N segments.
"""

from itertools import groupby, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model import flash
from model.attention import attend, prepare
from model.flash import FlashPlan, document_segments
from model.masks import MaskSpec

CPU = torch.device("cpu")
LENGTH = 8
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5] * 8, [2, 1, 0, 0, 0, 0, -1, -1], [2, 2, 2, 2, 2, 2, 2, 7]])


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
) -> Tensor:
    """flash_attn_varlen_func as its documentation puts it; causal masks are aligned to the bottom right corner."""
    out = torch.full_like(q, torch.nan)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (q.shape[0], k.shape[0])
    for (q_start, q_stop), (k_start, k_stop) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        num_queries, num_keys = q_stop - q_start, k_stop - k_start
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
        if causal:
            seen = seen.tril(num_keys - num_queries)
        out[q_start:q_stop] = scaled_dot_product_attention(
            q[q_start:q_stop].transpose(0, 1),
            k[k_start:k_stop].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0),
            v[k_start:k_stop].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0),
            attn_mask=seen,
        ).transpose(0, 1)
    return out


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_segments_are_runs_of_a_document_within_a_row() -> None:
    lengths = [len(list(run)) for row in DOCUMENTS.tolist() for _, run in groupby(row)]
    cu_seqlens, longest = document_segments(DOCUMENTS)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0
    assert cu_seqlens.diff().tolist() == lengths == [3, 4, 1, 8, 1, 1, 4, 2, 7, 1]
    assert longest == 8
    assert document_segments(DOCUMENTS[:1])[1] == 4
    assert document_segments(torch.zeros(3, 1, dtype=torch.int32))[0].tolist() == [0, 1, 2, 3]


def test_a_document_in_pieces_is_refused() -> None:
    pieces = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"row 1 .* in several pieces.*train\.attention=flex"):
        document_segments(pieces)


@pytest.mark.parametrize(
    ("spec", "num_cached"),
    [
        (MaskSpec(), 0),
        (MaskSpec(), 3),
        (MaskSpec("causal"), 0),
        (MaskSpec("causal"), 3),
        (MaskSpec("causal"), 7),
        (MaskSpec(document_BL=DOCUMENTS), 0),
        (MaskSpec("causal", DOCUMENTS), 0),
    ],
)
@pytest.mark.parametrize(("num_heads", "num_groups"), [(2, 2), (4, 2)])
def test_it_agrees_with_sdpa(spec: MaskSpec, num_cached: int, num_heads: int, num_groups: int) -> None:
    """Gradients too: nothing is lost or mixed up between rows and segments."""
    num_rows, num_queries = DOCUMENTS.shape[0], LENGTH - num_cached
    outputs, gradients = [], []
    sdpa = prepare(spec, torch.zeros(num_rows, num_queries, 1), num_cached, "sdpa")
    for plan in (FlashPlan.of(spec, num_rows, num_queries, num_cached, CPU, reference), sdpa):
        inputs = [
            random(num_rows, num_queries, num_heads, 4, seed=0).requires_grad_(),
            random(num_rows, LENGTH, num_groups, 4, seed=1).requires_grad_(),
            random(num_rows, LENGTH, num_groups, 4, seed=2).requires_grad_(),
        ]
        out = attend(*inputs, plan)
        assert out.shape == (num_rows, num_queries, num_heads, 4)
        outputs.append(out)
        gradients.append(torch.autograd.grad((out * random(*out.shape, seed=3)).sum(), inputs))
    assert torch.allclose(*outputs, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_documents_equal_a_loop_over_their_segments(seed: int) -> None:
    """Each document attended alone, found by its number rather than by where it begins."""
    generator = torch.Generator().manual_seed(seed)
    document_BL = torch.randint(0, 3, (3, 20), generator=generator).sort(dim=1, descending=bool(seed % 2)).values
    query, key, value = (random(3, 20, 2, 4, seed=10 * seed + part) for part in range(3))
    plan = FlashPlan.of(MaskSpec(document_BL=document_BL), 3, 20, 0, CPU, reference)
    found = attend(query, key, value, plan)
    for row in range(3):
        for number in document_BL[row].unique():
            own = document_BL[row] == number
            alone = scaled_dot_product_attention(*(x[row, own].transpose(0, 1) for x in (query, key, value)))
            assert torch.allclose(found[row, own], alone.transpose(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_heads", "num_groups", "width"), [(2, 2, 8), (4, 2, 8), (2, 2, 5)])
def test_pytorchs_kernel_is_asked_for_the_same(
    causal: bool, num_heads: int, num_groups: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that takes what PyTorch's does: widths in eights, a window for causal, grouped heads by request."""
    asked: list[bool] = []

    def stand_in(*inputs: Tensor | int, scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:
        query, key, value, *segments = inputs
        assert isinstance(query, Tensor)
        assert query.shape[-1] % 8 == 0
        assert window_size in ((-1, -1), (-1, 0))
        asked.append(enable_gqa)
        corrected = query * scale * query.shape[-1] ** 0.5
        return reference(corrected, key, value, *segments, causal=window_size == (-1, 0))  # type: ignore[arg-type]

    monkeypatch.setattr(flash, "varlen_attn", stand_in)
    inputs = [random(6, heads, width, seed=seed) for seed, heads in enumerate((num_heads, num_groups, num_groups))]
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    found = flash.varlen(*inputs, ends, ends, 4, 4, causal=causal)
    torch.testing.assert_close(found, reference(*inputs, ends, ends, 4, 4, causal=causal))
    assert asked == [num_heads != num_groups]
