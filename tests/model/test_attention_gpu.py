"""Every backend on a GPU against SDPA in float64: outputs and gradients, for all the masks that it expresses.

Shapes: B sequences, Q queries, S keys, H query heads, G key/value heads, K head width.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import BACKENDS, BackendName, attend, prepare
from model.masks import Annealing, MaskSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NUM_ROWS, LENGTH, NUM_HEADS = 3, 256, 4
ENDS_BN = ((40, 41, 256), (256, 256, 256), (128, 200, 256))


def documents() -> Tensor:
    positions = torch.arange(LENGTH)
    return torch.stack([sum((positions >= end).int() for end in ends) for ends in ENDS_BN])  # type: ignore[misc]


SPECS = {
    "bidirectional": MaskSpec(),
    "causal": MaskSpec("causal"),
    "documents": MaskSpec(document_BL=documents()),
    "causal documents": MaskSpec("causal", documents()),
    "annealing": MaskSpec("causal", annealing=Annealing(0.5, 7)),
    "annealing, documents": MaskSpec("causal", documents(), annealing=Annealing(0.3, 8)),
    "window": MaskSpec("causal", annealing=Annealing(0.2)),
    "blocks": MaskSpec(block_size=32),
    "two streams": MaskSpec(block_size=32, two_streams=True),
    "two streams, documents": MaskSpec(document_BL=documents()[:, : LENGTH // 2], block_size=32, two_streams=True),
}


def on_gpu(spec: MaskSpec) -> MaskSpec:
    return spec if spec.document_BL is None else replace(spec, document_BL=spec.document_BL.cuda())


def attended(
    spec: MaskSpec, backend: BackendName, dtype: torch.dtype, *, cached: int, groups: int, width: int
) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, from the same numbers in any precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((LENGTH - cached, NUM_HEADS), (LENGTH, groups), (LENGTH, groups), (LENGTH - cached, NUM_HEADS))
    query, key, value, down = (
        torch.randn(NUM_ROWS, *shape, width, generator=generator).bfloat16().to("cuda", dtype) for shape in shapes
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    plan = prepare(on_gpu(spec), torch.zeros(NUM_ROWS, LENGTH - cached, 1, device="cuda", dtype=dtype), cached, backend)
    out = attend(*inputs, plan)
    return [out.detach(), *torch.autograd.grad((out * down).sum(), inputs)]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "width"), [(4, 64), (2, 128), (4, 20)])
def test_it_agrees_with_float64(name: str, backend: BackendName, groups: int, width: int) -> None:
    if not BACKENDS[backend].masks.issuperset(SPECS[name].kinds):
        with pytest.raises(ValueError, match="can not express"):
            attended(SPECS[name], backend, torch.bfloat16, cached=0, groups=groups, width=width)
        return
    wanted = attended(SPECS[name], "sdpa", torch.float64, cached=0, groups=groups, width=width)
    found = attended(SPECS[name], backend, torch.bfloat16, cached=0, groups=groups, width=width)
    for ours, exact in zip(found, wanted, strict=True):
        assert (ours.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_keys_before_the_queries(name: str, backend: BackendName) -> None:
    wanted = attended(SPECS[name], "sdpa", torch.float64, cached=96, groups=4, width=64)
    found = attended(SPECS[name], backend, torch.bfloat16, cached=96, groups=4, width=64)
    for ours, exact in zip(found, wanted, strict=True):
        assert (ours.double() - exact).norm() <= 0.01 * exact.norm()
