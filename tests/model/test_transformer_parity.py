"""The decoder configuration against transformers' Qwen2 and Llama, weight by weight."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import KVCache
from model.config import TransformerConfig
from model.masks import MaskSpec
from model.transformer import Transformer

VOCABULARY, THETA, EPS = 61, 50_000.0, 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}


def foreign_model(family: str, num_kv_heads: int, tied: bool) -> Any:
    """A random float32 model of transformers, with random norms and biases too."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        num_key_value_heads=num_kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=EPS,
        max_position_embeddings=256,
        **SIZES,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def ours_from(foreign: Any, family: str, num_kv_heads: int, tied: bool) -> Transformer:
    """Our transformer with the same weights, moved by name."""
    config = TransformerConfig(
        dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_dim=56,
        norm="rmsnorm",
        ffn="swiglu",
        norm_eps=EPS,
        qkv_bias=family == "Qwen2",
        tie_embeddings=tied,
        rope_theta=THETA,
    )
    names = {
        "model.embed_tokens": "embed",
        "model.layers": "blocks",
        "self_attn.o_proj": "attention.out",
        "self_attn": "attention",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp": "ffn",
        "model.norm": "norm",
        "lm_head": "head",
        "_proj": "",
    }
    renamed = {}
    for name, tensor in foreign.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    if tied:
        renamed.pop("head.weight", None)
    model = Transformer(config, VOCABULARY)
    model.load_state_dict(renamed, strict=True)
    return model


def tokens(num_sequences: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_sequences, length), generator=torch.Generator().manual_seed(1))


def zeros_mask(num_sequences: int, length: int) -> Tensor:
    return torch.zeros(num_sequences, 1, length, length)


CASES = list(itertools.product(("Qwen2", "Llama"), (1, 2, 4), (False, True)))


@pytest.mark.parametrize(("family", "num_kv_heads", "tied"), CASES)
@torch.no_grad()
def test_hidden_states_and_logits_agree(family: str, num_kv_heads: int, tied: bool) -> None:
    foreign = foreign_model(family, num_kv_heads, tied)
    ours = ours_from(foreign, family, num_kv_heads, tied)
    ids = tokens()
    outputs = {}
    for direction, attention_mask in (("causal", None), ("bidirectional", zeros_mask(2, 17))):
        expected = foreign(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        hidden = ours(ids, mask=MaskSpec(direction=direction))  # type: ignore[arg-type]
        outputs[direction] = hidden
        assert (hidden - expected.hidden_states[-1]).abs().max() < 1e-5 * max(1.0, hidden.abs().max().item())
        logits = ours.logits(hidden.flatten(0, 1)).view(2, 17, VOCABULARY)
        assert (logits - expected.logits).abs().max() < 1e-5 * max(1.0, logits.abs().max().item())
    assert (outputs["causal"] - outputs["bidirectional"]).abs().max() > 0.1


@torch.no_grad()
def test_positions_are_theirs_too() -> None:
    foreign = foreign_model("Qwen2", 2, True)
    ours = ours_from(foreign, "Qwen2", 2, True)
    ids, positions = tokens(), torch.tensor([[*range(9), *range(8)], [*range(100, 117)]])
    expected = foreign.model(
        input_ids=ids, position_ids=positions, attention_mask=zeros_mask(2, 17), use_cache=False
    ).last_hidden_state
    assert torch.allclose(ours(ids, positions=positions), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(ids), expected, atol=1e-3)


def test_gradients_agree() -> None:
    foreign = foreign_model("Qwen2", 2, True)
    ours = ours_from(foreign, "Qwen2", 2, True)
    ids = tokens()
    target = torch.randn(2 * 17, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits = foreign(input_ids=ids, attention_mask=zeros_mask(2, 17), use_cache=False).logits.flatten(0, 1)
    (logits * target).sum().backward()
    (ours.logits(ours(ids).flatten(0, 1)) * target).sum().backward()
    theirs: Any = foreign.model
    mine: Any = ours
    block, layer = mine.blocks[1], theirs.layers[1]
    pairs = [
        (mine.embed.weight, theirs.embed_tokens.weight),
        (mine.norm.weight, theirs.norm.weight),
        (block.attention.k.bias, layer.self_attn.k_proj.bias),
        (block.attention.q.weight, layer.self_attn.q_proj.weight),
        (block.ffn.gate.weight, layer.mlp.gate_proj.weight),
    ]
    for found, expected in pairs:
        assert (found.grad - expected.grad).abs().max() < 1e-4 * expected.grad.abs().max()


@pytest.mark.parametrize("chunks", [(17,), (1,) * 17, (5, 1, 7, 4), (16, 1)])
@torch.no_grad()
def test_a_cache_changes_nothing(chunks: tuple[int, ...]) -> None:
    ours = ours_from(foreign_model("Qwen2", 2, True), "Qwen2", 2, True)
    ids, causal = tokens(), MaskSpec(direction="causal")
    whole = ours(ids, mask=causal)
    cache, pieces = KVCache(), []
    for piece in ids.split(chunks, dim=1):
        pieces.append(ours(piece, mask=causal, cache=cache))
    assert cache.length == 17
    assert len(cache.layers) == 3
    assert cache.layers[0][0].shape == (2, 17, 2, 8)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_bidirectional_query_sees_all_of_the_cache() -> None:
    ours = ours_from(foreign_model("Qwen2", 2, True), "Qwen2", 2, True)
    ids, cache = tokens(), KVCache()
    first = ours(ids[:, :10], cache=cache)
    second = ours(ids[:, 10:], cache=cache)
    assert torch.allclose(first, ours(ids[:, :10]), atol=2e-6)
    own, seen = torch.arange(17) >= 10, torch.zeros(17, 17)
    seen[~own] = torch.where(own, -torch.inf, 0.0)
    foreign = foreign_model("Qwen2", 2, True).model
    expected = foreign(input_ids=ids, attention_mask=seen.expand(2, 1, 17, 17), use_cache=False).last_hidden_state
    assert torch.allclose(torch.cat((first, second), 1), expected, atol=1e-5, rtol=1e-5)


def test_documents_with_a_cache_are_refused() -> None:
    model = Transformer(TransformerConfig(dim=8, num_layers=1, num_heads=2), 5)
    cache, ids = KVCache(), torch.zeros(1, 3, dtype=torch.int64)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="one document per row"):
        model(ids, cache=cache, mask=MaskSpec(document_BL=torch.zeros(1, 6, dtype=torch.int32)))
