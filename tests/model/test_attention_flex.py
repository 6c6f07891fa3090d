"""FlexAttention, forward on the CPU: it sees exactly what a mask allows, agrees with SDPA, and reuses what it may.

Shapes: B sequences, L positions, Q queries, S keys, H query heads, G key/value heads, K head width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

import model.flex
from model.attention import AttentionName, KVCache, attend, prepare
from model.batch import Batch
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import MaskedDiffusion, StepSchedule
from model.flex import FlexPlan
from model.masks import Annealing, MaskSpec
from model.noise import NoiseKey
from model.transformer import Transformer, use_attention

CPU = torch.device("cpu")
LENGTH = 8
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 2, 2, 5, 5, -1, -1]])
SPECS = {
    "bidirectional": MaskSpec(),
    "causal": MaskSpec("causal"),
    "documents": MaskSpec(document_BL=DOCUMENTS),
    "causal documents": MaskSpec("causal", DOCUMENTS),
    "annealing": MaskSpec("causal", annealing=Annealing(0.5, 7)),
    "annealing, documents": MaskSpec("causal", DOCUMENTS, annealing=Annealing(0.5, 2**63 + 5)),
    "window": MaskSpec("causal", annealing=Annealing(0.25)),
    "blocks": MaskSpec(block_size=2),
    "blocks, documents": MaskSpec(document_BL=DOCUMENTS, block_size=4),
    "two streams": MaskSpec(block_size=2, two_streams=True),
    "two streams, documents": MaskSpec(document_BL=DOCUMENTS, block_size=2, two_streams=True),
    "two streams of one block": MaskSpec(block_size=8, two_streams=True),
    "two streams of single positions": MaskSpec(block_size=1, two_streams=True),
}
CACHED = {name: spec for name, spec in SPECS.items() if spec.document_BL is None and not spec.two_streams}
CASES = [*((name, 0) for name in SPECS), *((name, cached) for name in CACHED for cached in (1, 5))]
each_case = pytest.mark.parametrize(("name", "num_cached"), CASES)


@pytest.fixture(autouse=True)
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And no tracing, which takes longer than all else here: PyTorch calls the rule as it is."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def may_see(spec: MaskSpec, row: int, query: int, key: int) -> bool:
    """Restated one pair at a time; positions count from the first key."""
    place = [position % LENGTH if spec.two_streams else position for position in (query, key)]
    if spec.document_BL is not None and spec.document_BL[row, place[0]] != spec.document_BL[row, place[1]]:
        return False
    if not spec.block_size:
        return spec.direction == "bidirectional" or key <= query or shown_ahead(spec.annealing, query, key)
    query_block, key_block = (position // spec.block_size for position in place)
    if not spec.two_streams:
        return key_block <= query_block
    query_clean, key_clean = query >= LENGTH, key >= LENGTH
    if query_clean == key_clean and query_block == key_block:
        return True
    return key_clean and key_block < query_block


def shown_ahead(annealing: Annealing | None, query: int, key: int) -> bool:
    """SplitMix64 of the pair in Python's own integers, or the window of LENGTH positions."""
    if annealing is None or annealing.key is None:
        return annealing is not None and key - query <= annealing.ratio * LENGTH
    bits, limit = (((query << 32) + key) * 0x9E3779B97F4A7C15 + annealing.key) % 2**64, 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> shift)) * factor % limit
    return bits >> 32 < annealing.ratio * 2**32


def num_keys_of(spec: MaskSpec) -> int:
    return 2 * LENGTH if spec.two_streams else LENGTH


def compute(name: AttentionName, spec: MaskSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    inputs = torch.zeros(query.shape[0], query.shape[1], 1)
    return attend(query, key, value, prepare(spec, inputs, key.shape[1] - query.shape[1], name))


@each_case
def test_every_query_weighs_the_keys_it_may_see_and_no_other(name: str, num_cached: int) -> None:
    """With the unit vectors for values, the outputs are the weights."""
    spec = SPECS[name]
    num_keys = num_keys_of(spec)
    value_BSGK = torch.eye(num_keys, dtype=torch.float64).expand(2, 1, -1, -1).transpose(1, 2)
    query_BQHK, key_BSGK = random(2, num_keys - num_cached, 2, 4), random(2, num_keys, 1, 4, seed=1)
    weight_BQHS = compute("flex", spec, query_BQHK, key_BSGK, value_BSGK)
    assert torch.allclose(weight_BQHS.sum(-1), torch.ones((), dtype=torch.float64))
    for row in range(2):
        wanted = [[may_see(spec, row, query, key) for key in range(num_keys)] for query in range(num_cached, num_keys)]
        for head in range(2):
            assert torch.equal(weight_BQHS[row, :, head] > 0, torch.tensor(wanted))


@each_case
@pytest.mark.parametrize(("num_heads", "num_groups"), [(2, 2), (4, 2), (4, 1)])
def test_it_agrees_with_sdpa(name: str, num_cached: int, num_heads: int, num_groups: int) -> None:
    spec, num_keys = SPECS[name], num_keys_of(SPECS[name])
    query_BQHK = random(2, num_keys - num_cached, num_heads, 4)
    key_BSGK, value_BSGK = random(2, num_keys, num_groups, 4, seed=1), random(2, num_keys, num_groups, 4, seed=2)
    found, wanted = (compute(each, spec, query_BQHK, key_BSGK, value_BSGK) for each in ("flex", "sdpa"))
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    single = [x.float() for x in (query_BQHK, key_BSGK, value_BSGK)]
    assert torch.allclose(compute("flex", spec, *single), compute("sdpa", spec, *single), atol=1e-6)
    half = [x.bfloat16() for x in single]
    out = compute("flex", spec, *half)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out, compute("sdpa", spec, *half), atol=1e-2)


@pytest.mark.parametrize(
    ("spec", "num_cached"),
    [
        (MaskSpec(block_size=64, two_streams=True), 0),
        (MaskSpec(block_size=64), 256),
        (MaskSpec("causal"), 128),
        (MaskSpec(document_BL=torch.arange(512).expand(2, -1) // 192), 0),
        (MaskSpec("causal", torch.arange(512).expand(2, -1) // 192), 0),
    ],
)
def test_the_tiles_to_compute_are_those_in_which_something_is_seen(spec: MaskSpec, num_cached: int) -> None:
    """Kernels on a GPU skip the others, and do not ask the rule in tiles that are seen whole."""
    num_keys, tile = 512, 128
    block_mask = FlexPlan.of(spec, num_keys - num_cached, num_cached, CPU).block_mask
    assert block_mask is not None
    assert (tile, tile) == block_mask.BLOCK_SIZE
    visible = spec.visible(num_keys - num_cached, num_keys, CPU)
    assert visible is not None
    tiles = visible[:, 0].unflatten(1, (-1, tile)).unflatten(3, (-1, tile)).transpose(2, 3).flatten(3)
    whole, touched = tiles.all(-1), tiles.any(-1)
    full, partial = torch.zeros_like(whole), torch.zeros_like(whole)
    assert block_mask.full_kv_num_blocks is not None
    assert block_mask.full_kv_indices is not None
    for row in range(tiles.shape[0]):
        for query in range(tiles.shape[1]):
            num_full, num_partial = (
                int(count[row, 0, query]) for count in (block_mask.full_kv_num_blocks, block_mask.kv_num_blocks)
            )
            full[row, query, block_mask.full_kv_indices[row, 0, query, :num_full].long()] = True
            partial[row, query, block_mask.kv_indices[row, 0, query, :num_partial].long()] = True
    assert torch.equal(full, whole)
    assert torch.equal(partial, touched & ~whole)
    assert not touched.all()


TRUNK = TransformerConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2)


def make_transformer(name: AttentionName) -> Transformer:
    trunk = Transformer(TRUNK, 23).double()
    for number, parameter in enumerate(trunk.parameters()):
        parameter.copy_(0.3 * random(*parameter.shape, seed=number))
    trunk.attention_backend = name
    return trunk


def tokens(length: int) -> Tensor:
    return torch.randint(0, 23, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SPECS)
def test_transformers_agree(name: str) -> None:
    flex, sdpa, ids = make_transformer("flex"), make_transformer("sdpa"), tokens(num_keys_of(SPECS[name]))
    assert torch.allclose(flex(ids, mask=SPECS[name]), sdpa(ids, mask=SPECS[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_traced_rules_do_not_remember_the_documents_or_blocks_of_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace may serve masks that differ in what their rule captures."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    flex, sdpa, ids = make_transformer("flex"), make_transformer("sdpa"), tokens(2 * LENGTH)
    for documents, block_size in ((DOCUMENTS, 2), (DOCUMENTS.flip(1), 2), (DOCUMENTS, 4), (DOCUMENTS.flip(0), 1)):
        spec = MaskSpec(document_BL=documents, block_size=block_size, two_streams=True)
        assert torch.allclose(flex(ids, mask=spec), sdpa(ids, mask=spec), rtol=1e-12, atol=1e-12)
    for annealing in (Annealing(0.2, 1), Annealing(0.8, 1), Annealing(0.8, 2), Annealing(0.2), Annealing(0.6)):
        spec = MaskSpec("causal", annealing=annealing)
        assert torch.allclose(flex(ids, mask=spec), sdpa(ids, mask=spec), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [MaskSpec(), MaskSpec("causal")], ids=str)
def test_a_cache_is_read_alike(spec: MaskSpec) -> None:
    ids, outputs = tokens(LENGTH), []
    for name in ("flex", "sdpa"):
        trunk, cache = make_transformer(name), KVCache()  # type: ignore[arg-type]
        outputs.append([trunk(ids[:, start : start + 2], mask=spec, cache=cache) for start in range(0, LENGTH, 2)])
    assert torch.allclose(torch.stack(outputs[0]), torch.stack(outputs[1]), rtol=1e-12, atol=1e-12)


CONDITIONED = replace(TRUNK, condition_dim=8)
LATENT = LatentConfig(dim=4, recognition=RecognitionConfig(num_layers=1))
SMALL = ModelConfig(backbone=CONDITIONED, vocab_size=23, mask_id=22, latent=LATENT)
MODELS = {
    "ar": replace(SMALL, backbone=TRUNK, latent=None, autoregressive=True),
    "vadd": SMALL,
    "block vmd": replace(SMALL, block_size=2),
    "prior given blocks, hints": replace(
        SMALL, block_size=4, latent=replace(LATENT, prior="x_t", prior_layers=1), augmentation=AugmentationConfig()
    ),
    "prior given earlier latents": replace(
        SMALL, block_size=4, latent=replace(LATENT, prior="earlier_blocks", prior_layers=1)
    ),
}


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_agree(
    name: str,
    documents: Tensor | None,
    build: Callable[[ModelConfig], MaskedDiffusion],
    make_batch: Callable[..., Batch],
) -> None:
    """With every transformer of the model on the backend: denoiser, recognition network, prior."""
    config, batch = MODELS[name], replace(make_batch(2, LENGTH, 22), document_BL=documents)
    diffusion = build(config)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    losses = []
    for backend in ("sdpa", "flex"):
        for trunk in diffusion.modules():
            if isinstance(trunk, Transformer):
                trunk.attention_backend = backend  # type: ignore[assignment]
        losses.append(diffusion(batch, corruption, step=StepSchedule()).loss_B)
    assert torch.allclose(losses[1], losses[0], rtol=1e-10)


@pytest.mark.parametrize("name", ["causal", "blocks"])
def test_a_mask_of_fixed_shape_is_built_once(name: str) -> None:
    def block_mask(spec: MaskSpec, num_queries: int, num_cached: int, device: torch.device = CPU) -> object:
        return FlexPlan.of(spec, num_queries, num_cached, device).block_mask

    spec = CACHED[name]
    first = block_mask(spec, 6, 2)
    assert block_mask(replace(spec), 6, 2) is first
    assert block_mask(spec, 8, 0) is not first
    assert block_mask(spec, 6, 4) is not first
    assert block_mask(replace(spec, block_size=4), 6, 2) is not first
    assert block_mask(replace(spec, document_BL=DOCUMENTS), 8, 0) is not block_mask(spec, 8, 0)
    elsewhere = block_mask(spec, 6, 2, torch.device("meta"))
    assert elsewhere is not first
    assert elsewhere.kv_indices.device.type == "meta"  # type: ignore[attr-defined]
    assert block_mask(spec, 6, 2) is first


def test_documents_are_built_once_per_forward_pass_and_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    built, original = [], model.flex.create_block_mask

    def counting(*arguments: object, **keywords: object) -> object:
        built.append(arguments)
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(model.flex, "create_block_mask", counting)
    flex, sdpa, ids = make_transformer("flex"), make_transformer("sdpa"), tokens(LENGTH)
    for count, documents in enumerate((DOCUMENTS, DOCUMENTS.flip(1), DOCUMENTS.flip(0), DOCUMENTS), start=1):
        spec = MaskSpec(document_BL=documents)
        assert torch.allclose(flex(ids, mask=spec), sdpa(ids, mask=spec), rtol=1e-12, atol=1e-12)
        assert len(built) == count


def test_masks_made_while_sampling_serve_training() -> None:
    with torch.inference_mode():
        block_mask = FlexPlan.of(MaskSpec(block_size=3), 9, 0, CPU).block_mask
    assert block_mask is not None
    assert not block_mask.kv_indices.is_inference()


def test_training_on_the_cpu_is_refused() -> None:
    trunk = make_transformer("flex")
    with torch.enable_grad(), pytest.raises(ValueError, match=r"flex trains on cuda only.*train\.attention=sdpa"):
        trunk(tokens(LENGTH))
    with pytest.raises(ValueError, match=r"flex trains on cuda only, not on cpu: set train\.attention=sdpa"):
        use_attention(trunk, "flex", CPU)
