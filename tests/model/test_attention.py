"""Which backend attends: the table of what each can do, its refusals, what `auto` stands for, and where it is set."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from model.attention import BACKENDS, AttentionName, BackendName, choose, prepare, refuse_dtype
from model.config import LatentConfig, ModelConfig, PointMlpConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.flex import FlexPlan
from model.masks import Annealing, MaskKind, MaskSpec
from model.sdpa import SdpaPlan
from model.transformer import Transformer, use_attention
from pretrain.config import TrainConfig
from pretrain.settings import validate

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DOCUMENTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
SPECS = {
    "bidirectional": MaskSpec(),
    "causal": MaskSpec("causal"),
    "documents": MaskSpec(document_BL=DOCUMENTS),
    "causal documents": MaskSpec("causal", DOCUMENTS),
    "annealing": MaskSpec("causal", annealing=Annealing(0.5, 7)),
    "annealing, documents": MaskSpec("causal", DOCUMENTS, annealing=Annealing(0.5)),
    "blocks": MaskSpec(block_size=2),
    "two streams": MaskSpec(block_size=2, two_streams=True),
    "two streams, documents": MaskSpec(document_BL=DOCUMENTS, block_size=2, two_streams=True),
}
INPUTS = torch.zeros(2, 4, 8)


def test_the_table_knows_every_backend_and_every_mask() -> None:
    assert set(BACKENDS) == set(get_args(BackendName)) == set(get_args(AttentionName)) - {"auto"}
    seen = {kind for spec in SPECS.values() for kind in spec.kinds}
    assert seen == set(get_args(MaskKind))
    for backend in BACKENDS.values():
        assert BACKENDS[backend.instead].masks == seen


@pytest.mark.parametrize("name", SPECS)
def test_blocks_and_annealing_are_refused_by_flash_and_nothing_else(name: str) -> None:
    spec, kind = SPECS[name], SPECS[name].kinds[0]
    with torch.no_grad():
        assert isinstance(prepare(spec, INPUTS, 0, "sdpa"), SdpaPlan)
        assert isinstance(prepare(spec, INPUTS, 0, "flex"), FlexPlan)
    if kind in ("blocks", "annealing"):
        with pytest.raises(ValueError, match=rf"flash can not express a mask of {kind}, .*train\.attention=flex"):
            prepare(spec, INPUTS, 0, "flash")
    else:
        with pytest.raises(ValueError, match=r"flash computes on cuda only, not on cpu: set train\.attention=sdpa"):
            prepare(spec, INPUTS, 0, "flash")


def test_flash_computes_in_half_precision() -> None:
    refuse_dtype("flash", torch.bfloat16)
    refuse_dtype("sdpa", torch.float32)
    with pytest.raises(ValueError, match=r"computes in bfloat16, float16, not in float32: set train\.precision=bf16"):
        refuse_dtype("flash", torch.float32)


@pytest.mark.parametrize("backend", get_args(BackendName))
def test_documents_with_a_cache_are_refused(backend: BackendName) -> None:
    with pytest.raises(ValueError, match="one document per row"):
        prepare(SPECS["documents"], INPUTS, 3, backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast' is not one of auto, sdpa, flex, flash"):
        use_attention(torch.nn.Linear(1, 1), "fast", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECS)
def test_auto_is_sdpa_on_the_cpu(name: str) -> None:
    assert isinstance(prepare(SPECS[name], INPUTS, 0, "auto"), SdpaPlan)


AUTO_ON_CUDA = {  # in bf16, in fp32
    "bidirectional": ("sdpa", "sdpa"),
    "causal": ("sdpa", "sdpa"),
    "documents": ("flash", "flex"),
    "causal documents": ("flash", "flex"),
    "annealing": ("flex", "flex"),
    "annealing, documents": ("flex", "flex"),
    "blocks": ("flex", "flex"),
    "two streams": ("flex", "flex"),
    "two streams, documents": ("flex", "flex"),
}


@pytest.mark.parametrize("name", SPECS)
def test_auto_on_a_gpu_needs_no_dense_mask(name: str) -> None:
    found = (choose(SPECS[name], CUDA, torch.bfloat16), choose(SPECS[name], CUDA, torch.float32))
    assert found == AUTO_ON_CUDA[name]


def test_every_transformer_of_a_model_is_set() -> None:
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, condition_dim=8)
    config = ModelConfig(backbone=backbone, vocab_size=9, mask_id=8, block_size=2, latent=LatentConfig(dim=4))
    for prior, count in (("normal", 2), ("x_t", 3), ("earlier_blocks", 3)):
        latent = replace(LatentConfig(dim=4), prior=prior)  # type: ignore[arg-type]
        diffusion = MaskedDiffusion(replace(config, latent=latent))
        trunks = [module for module in diffusion.modules() if isinstance(module, Transformer)]
        assert [trunk.attention_backend for trunk in trunks] == ["sdpa"] * count
        use_attention(diffusion, "auto", CPU)
        assert [trunk.attention_backend for trunk in trunks] == ["auto"] * count
    use_attention(MaskedDiffusion(ModelConfig(backbone=PointMlpConfig(), vocab_size=9, mask_id=8)), "auto", CPU)


def test_the_setting_is_one_of_a_run_and_not_of_a_model() -> None:
    run = {"name": "small", "data": {"kind": "shards", "path": "text"}}
    for name in get_args(AttentionName):
        assert validate(run, [f"train.attention={name}"]).train.attention == name
    with pytest.raises(ValueError, match=r"train\.attention='fast'.*'auto', 'sdpa', 'flex' or 'flash'"):
        validate(run, ["train.attention=fast"])
    assert TrainConfig().attention == "auto"
    assert not [key for key in vars(TransformerConfig(dim=16)) if "attention" in key]
