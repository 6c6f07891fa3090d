"""The DiT configuration: documents, hints, conditions, dropout and recomputation.

Shapes: B sequences, L positions, D width, C condition width.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import TransformerConfig
from model.masks import MaskSpec
from model.transformer import Transformer

VOCABULARY, LENGTH = 23, 12
SMALL = TransformerConfig(dim=16, num_layers=2, num_heads=2)
CONDITIONED = replace(SMALL, condition_dim=6)


def build(config: TransformerConfig = SMALL, *, time: bool = False, scale: float = 0.3) -> Transformer:
    """A model in float32 with every parameter random."""
    model = Transformer(config, VOCABULARY, time_conditioning=time)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(num_sequences: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (num_sequences, LENGTH), generator=generator)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 2 + [1] * 7 + [-1] * 3])
POSITIONS = torch.tensor([[*range(5), *range(4), *range(3)], [*range(2), *range(7), *range(3)]])


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@torch.no_grad()
def test_documents_do_not_see_each_other(direction: str) -> None:
    model, ids = build(), tokens()
    mask = MaskSpec(direction=direction, document_BL=DOCUMENTS)  # type: ignore[arg-type]
    base = model(ids, mask=mask, positions=POSITIONS)
    for row, place in ((0, 0), (0, 4), (0, 6), (0, 11), (1, 1), (1, 8), (1, 10)):
        changed = ids.clone()
        changed[row, place] = (changed[row, place] + 1) % VOCABULARY
        moved = (model(changed, mask=mask, positions=POSITIONS) - base).abs().amax(-1) > 1e-7
        same = torch.eq(DOCUMENTS, DOCUMENTS[row, place])
        same[1 - row] = False
        later = torch.arange(LENGTH) >= place
        assert torch.equal(moved, same if direction == "bidirectional" else same & later)


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@torch.no_grad()
def test_packed_documents_equal_separate_ones(direction: str) -> None:
    model, ids = build(), tokens()
    mask = MaskSpec(direction=direction, document_BL=DOCUMENTS)  # type: ignore[arg-type]
    packed = model(ids, mask=mask, positions=POSITIONS)
    for row, start, stop in ((0, 0, 5), (0, 5, 9), (0, 9, 12), (1, 0, 2), (1, 2, 9)):
        alone = model(ids[row : row + 1, start:stop], mask=MaskSpec(direction=direction))  # type: ignore[arg-type]
        assert torch.allclose(packed[row, start:stop], alone[0], atol=2e-5)


@torch.no_grad()
def test_one_document_is_no_document_mask() -> None:
    model, ids = build(), tokens()
    one = MaskSpec(document_BL=torch.zeros(2, LENGTH, dtype=torch.int32))
    assert torch.allclose(model(ids, mask=one), model(ids), atol=2e-5)


@torch.no_grad()
def test_attention_depends_on_relative_positions_only() -> None:
    model, ids = build(), tokens()
    positions = torch.arange(LENGTH)[None]
    assert torch.allclose(model(ids, positions=positions + 40), model(ids), atol=1e-4)
    assert not torch.allclose(model(ids, positions=2 * positions), model(ids), atol=1e-2)


def test_hints_and_input_embeddings_enter_where_tokens_do() -> None:
    model, ids, hint = build(), tokens(), random(2, LENGTH, 16).requires_grad_()
    embedded = model.embed(ids)
    assert torch.equal(model(embedded), model(ids))
    assert torch.equal(model(ids, hint=hint), model(embedded + hint))
    assert torch.equal(model(ids, hint=torch.zeros_like(hint)), model(ids))
    model(ids, hint=hint).square().sum().backward()
    assert hint.grad is not None
    assert hint.grad.abs().min() > 0


@pytest.mark.parametrize("modulation", ["per_block", "shared"])
@torch.no_grad()
def test_adaln_zero_starts_as_the_identity(modulation: str) -> None:
    model = build(replace(CONDITIONED, modulation=modulation))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.zero_()
    ids = tokens()
    expected = torch.nn.functional.layer_norm(model.embed(ids), (16,), eps=model.config.norm_eps)
    assert torch.allclose(model(ids, condition=random(2, 6)), expected, atol=1e-6)


@pytest.mark.parametrize("modulation", ["per_block", "shared"])
@torch.no_grad()
def test_conditions_per_sequence_segment_and_position_agree_when_constant(modulation: str) -> None:
    model = build(replace(CONDITIONED, modulation=modulation))  # type: ignore[arg-type]
    ids, condition_BC = tokens(), random(2, 6)
    base = model(ids, condition=condition_BC)
    for segments in (1, 3, LENGTH):
        repeated = condition_BC[:, None].expand(2, segments, 6)
        assert torch.allclose(model(ids, condition=repeated), base, atol=2e-5)
    assert not torch.allclose(model(ids, condition=condition_BC + 1), base, atol=1e-2)


@torch.no_grad()
def test_a_segment_is_modulated_by_its_own_condition() -> None:
    model, ids = build(replace(CONDITIONED, num_layers=1)), tokens()
    alone = MaskSpec(document_BL=torch.arange(LENGTH).expand(2, LENGTH))
    condition_BSC = random(2, 3, 6)
    found = model(ids, condition=condition_BSC, mask=alone)
    for segment in range(3):
        places = slice(4 * segment, 4 * segment + 4)
        whole = model(ids, condition=condition_BSC[:, segment], mask=alone)
        assert torch.allclose(found[:, places], whole[:, places], atol=2e-5)
    per_position = model(ids, condition=condition_BSC.repeat_interleave(4, 1), mask=alone)
    assert torch.allclose(per_position, found, atol=2e-5)


@torch.no_grad()
def test_times_per_sequence_segment_and_position_agree_when_constant() -> None:
    model, ids, t_B = build(CONDITIONED, time=True), tokens(), torch.tensor([0.1, 0.8])
    base = model(ids, t=t_B)
    for segments in (1, 4, LENGTH):
        assert torch.allclose(model(ids, t=t_B[:, None].expand(2, segments)), base, atol=2e-5)
    assert not torch.allclose(model(ids, t=t_B + 0.05), base, atol=1e-3)
    condition_BC = random(2, 6)
    assert torch.allclose(
        model(ids, t=t_B, condition=condition_BC),
        model(ids, t=t_B[:, None], condition=condition_BC[:, None]),
        atol=2e-5,
    )


@torch.no_grad()
def test_time_and_condition_add_up() -> None:
    model, ids, t_B, condition_BC = build(CONDITIONED, time=True), tokens(), torch.tensor([0.1, 0.8]), random(2, 6)
    assert model.time is not None
    embedded_BC = model.time(t_B[:, None])[:, 0]
    untimed = build(CONDITIONED)
    untimed.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("time.")})
    found = model(ids, t=t_B, condition=condition_BC)
    assert torch.allclose(found, untimed(ids, condition=embedded_BC + condition_BC), atol=2e-5)


@torch.no_grad()
def test_shared_modulation_is_per_block_modulation_with_one_matrix() -> None:
    shared = build(replace(CONDITIONED, modulation="shared"))
    own = build(CONDITIONED)
    assert shared.modulation is not None
    weights = shared.state_dict()
    for layer in range(2):
        for kind in ("weight", "bias"):
            weights[f"blocks.{layer}.modulation.{kind}"] = weights[f"modulation.{kind}"]
    own.load_state_dict({k: v for k, v in weights.items() if not k.startswith("modulation.")}, strict=True)
    ids, condition = tokens(), random(2, 3, 6)
    assert torch.allclose(shared(ids, condition=condition), own(ids, condition=condition), atol=2e-5)
    count = [sum(p.numel() for p in model.parameters()) for model in (own, shared)]
    assert count[0] - count[1] == (6 + 1) * 6 * 16


def test_conditions_that_do_not_fit_are_refused() -> None:
    ids = tokens()
    with pytest.raises(ValueError, match="condition_dim"):
        build()(ids, condition=random(2, 6))
    with pytest.raises(ValueError, match="pass condition"):
        build(CONDITIONED)(ids)
    with pytest.raises(ValueError, match="needs t"):
        build(CONDITIONED, time=True)(ids)
