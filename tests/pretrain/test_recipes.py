"""Every recipe resolves and is listed; a shrunken one of each kind trains; sizes and token counts are the papers'."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.packing import ShardSource
from data_pipeline.tokenize import tokenize
from launchers.cli import main
from launchers.describe import list_recipes
from model.config import ModelConfig, PointMlpConfig
from model.diffusion import MaskedDiffusion
from model.size import num_parameters
from pretrain.config import RunConfig
from pretrain.data_config import ShardData
from pretrain.hooks.metrics import read_metrics
from pretrain.recipes import build, recipes
from pretrain.settings import dump_config
from pretrain.train import train

REPRESENTATIVES = [
    "text8_vmd_8",
    "text8_small_ar",
    "lm1b_padded_vadd",
    "lm1b_packed_cadd",
    "lm1b_blocks_bd3lm_4",
    "dit_small",
    "coder_0_5b",
    "demo",
    "toy_functions",
    "two_token_deterministic_vmd",
    "four_token_d1_vmd_blocks",
    "needle_20_vmd",
    "toy2d_checkerboard_vadd",
    "sudoku4_unique_vmd",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pieces of 27 symbols, each with its end token four rows of 256."""
    folder = tmp_path_factory.mktemp("text")
    draws = torch.randint(27, (16, 1023), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = ["".join("abcdefghijklmnopqrstuvwxyz "[symbol] for symbol in piece) for piece in draws]
    (folder / "text8.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    tokenize(str(folder / "text8.jsonl"), tokenizer="characters", out=folder / "shards")
    return folder / "shards"


def shrunken(name: str, folder: Path, shards: Path, *overrides: str) -> RunConfig:
    """Two rows, one step, a network of two thin layers."""
    config = build(name)
    length, small = config.data.length, ["model.backbone.dim=16", "model.backbone.num_layers=2"]
    if not isinstance(config.model.backbone, PointMlpConfig):
        small += ["model.backbone.num_heads=2", "model.backbone.num_kv_heads=1", "model.backbone.ffn_dim=32"]
        small += ["model.latent.recognition.num_layers=1"] * (config.model.latent is not None)
    if isinstance(config.data, ShardData):
        length = min(length, 1024)
        small += [f"data.path={shards}", f"data.length={length}", "data.prepare=null", "model.vocab_size=0"]
    elif name == "toy_functions":
        small += ["data.num_trees=40", "data.num_held_out=4"]
    else:
        small.append("data.num_rows=64")
    small += ["data.num_workers=0", f"train.batch_tokens={2 * length}", "train.micro_batch_tokens=null"]
    small += ["train.steps=1", "train.precision=fp32", "log.every=1", "validation.num_sequences=2", f"folder={folder}"]
    return build(name, [*small, *overrides])


def trained(config: RunConfig) -> dict[str, float]:
    """The line of the first step."""
    train(config)
    lines = read_metrics(config.path / "metrics.jsonl")
    assert any(line["kind"] == "validation" for line in lines)
    return next(line for line in lines if line["kind"] == "train")


def test_every_recipe_is_listed() -> None:
    assert [line.split()[0] for line in list_recipes().splitlines()[1:] if line][: len(recipes())] == list(recipes())


@pytest.mark.parametrize("name", ["text8_vmd_256", "lm1b_padded_vadd", "owt_cadd_from_mdlm"])
def test_a_dry_run_prints_what_would_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["penumbra", "train", name, "--dry-run"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert capsys.readouterr().out == dump_config(build(name))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_shrunken_recipe_trains(name: str, tmp_path: Path, shards: Path) -> None:
    line = trained(shrunken(name, tmp_path / "run", shards))
    assert line["loss"] > 0
    assert line["grad_norm"] > 0
    assert line["skipped"] == 0


def test_hints_begin_silent_in_a_model_that_continues_mdlm(tmp_path: Path, shards: Path) -> None:
    train(shrunken("owt_mdlm", tmp_path / "parent", shards))
    init = f"init_from={tmp_path / 'parent'}"
    names = ("owt_mdlm", "owt_cadd_from_mdlm", "owt_cadd")
    parent, gated, open_ = (trained(shrunken(name, tmp_path / name, shards, init))["ce"] for name in names)
    assert gated == pytest.approx(parent, rel=1e-6)
    assert open_ != pytest.approx(parent, rel=1e-6)


def test_pieces_of_text8_end_where_rows_end(shards: Path) -> None:
    source = ShardSource(shards, "train", 256)
    rows = source.gather(torch.arange(len(source)).numpy())
    assert not rows["document"].any()
    assert (65_535 + 1) % 256 == 0


@pytest.mark.parametrize(
    ("name", "billions"),
    [("owt_cadd", 262), ("owt_mdlm", 262), ("owt_vadd", 524), ("owt_cadd_from_mdlm", 50), ("lm1b_packed_cadd", 65.5)],
)
def test_tokens_seen(name: str, billions: float) -> None:
    """CADD B.2 as the errata read it, VADD B.3, CADD C.1, and 1M steps of 512 rows of 128."""
    config = build(name)
    assert config.train.steps * config.train.batch_tokens / 1e9 == pytest.approx(billions, rel=2e-3)


def with_gpt2_vocabulary(model: ModelConfig) -> ModelConfig:
    return model.with_vocabulary(50_258, 50_257)


def test_sizes_are_the_papers_up_to_adaln_that_hears_nothing() -> None:
    """CADD: 168M and 169M; VADD: around 125M (GPT-2 small, where the head is the embedding) and around 6% for adaLN."""
    plain = with_gpt2_vocabulary(build("owt_cadd").model)
    assert num_parameters(plain) / 1e6 == pytest.approx(162.2, abs=0.05)
    modulated = replace(build("owt_vadd").model, latent=None, time_conditioning=True)
    assert num_parameters(with_gpt2_vocabulary(modulated)) / 1e6 == pytest.approx(169, abs=0.6)
    head = 50_258 * 768
    assert (num_parameters(plain) - head) / 1e6 == pytest.approx(125, rel=0.02)
    adaln = num_parameters(with_gpt2_vocabulary(modulated)) - num_parameters(plain)
    assert adaln / (num_parameters(plain) - head) == pytest.approx(0.06, abs=0.001)


@pytest.mark.parametrize("name", ["text8_vmd_4", "text8_vmd_8", "text8_vmd_256", "lm1b_blocks_vmd_4"])
def test_the_encoder_of_vmd_is_half_of_its_decoder(name: str) -> None:
    """VMD Section 4.4; adaLN without gates makes it a little less."""
    with torch.device("meta"):
        model = MaskedDiffusion(build(name).model.with_vocabulary(31, 30))
    assert model.latent is not None
    encoder, decoder = (
        sum(parameter.numel() for parameter in trunk.blocks.parameters())
        for trunk in (model.latent.recognition.trunk, model.denoiser)
    )
    assert encoder / decoder == pytest.approx(0.5, abs=0.03)
    assert model.latent.dim == 128


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.augmentation.fusion=concat"],
        ["model.augmentation.fusion=reweight"],
        ["model.augmentation.path=vp"],
        ["model.augmentation.mse_weight=1", "model.augmentation.z0=hard"],
    ],
    ids=" ".join,
)
def test_the_ablations_of_cadd_are_overrides(overrides: list[str]) -> None:
    """CADD Tables 8 to 10."""
    assert build("owt_cadd", overrides).model.augmentation != build("owt_cadd").model.augmentation
