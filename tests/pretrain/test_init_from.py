"""Runs that begin with the weights of another: what they take over, what stays frozen, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data_pipeline.tokenizers import Tokenizer, make_tokenizer
from model.diffusion import MaskedDiffusion
from pretrain.checkpoint.load import CHECKPOINTS, initialise_from, load_for_evaluation
from pretrain.config import RunConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.parallel.mesh import single_process
from pretrain.train import train

MakeConfig = Callable[..., RunConfig]
ReadTrace = Callable[[Path], dict[int, dict[str, Any]]]

LATENT = ("model.latent.dim=4", "model.backbone.condition_dim=8", "model.backbone.gates=one")
EQUAL_AT_FIRST = {
    "latent": LATENT,
    "shared": (*LATENT, "model.backbone.modulation=shared"),
    "time": ("model.time_conditioning=true", "model.backbone.condition_dim=8", "model.backbone.gates=one"),
    "gated": ("model.augmentation.gated=true",),
    "gated_vp": ("model.augmentation.gated=true", "model.augmentation.path=vp", "model.augmentation.fusion=reweight"),
    "concat": ("model.augmentation.fusion=concat",),
    "both": (*LATENT, "model.augmentation.gated=true"),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    """A masked model of three steps, with averaged weights."""
    config = make_config(tmp_path_factory.mktemp("parent") / "run", "train.steps=3", "checkpoint.every=0")
    train(config)
    return config.path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer("bytes", lambda: iter(()))


def engine_of(config: RunConfig, tokenizer: Tokenizer) -> FsdpEngine:
    model = config.model.with_vocabulary(tokenizer.vocab_size, tokenizer.mask_id)
    return FsdpEngine(model, config.optim, config.train, config.parallel, single_process(), seed=config.seed)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.inference_mode()
def predicted(model: MaskedDiffusion, rows: int = 3, length: int = 32) -> Tensor:
    """Logits of half-masked rows; z and hints, where there are any, are loud noise."""
    generator = torch.Generator().manual_seed(0)
    x_t_BL = torch.randint(256, (rows, length), generator=generator)
    x_t_BL[:, ::2] = model.config.mask_id
    latent = torch.randn(rows, 1, 4, generator=generator) * 3
    hint = torch.randn(rows, length, 32, generator=generator) * 3
    hidden = model.eval().denoise(
        x_t_BL,
        t=torch.full((rows,), 0.5),
        latent=latent if model.latent is not None else None,
        hint=hint if model.augmentation is not None else None,
    )
    return model.logits(hidden.flatten(0, 1))[:, :256]


@pytest.mark.parametrize("name", EQUAL_AT_FIRST)
def test_a_child_predicts_what_its_parent_does(
    make_config: MakeConfig, tmp_path: Path, parent: Path, tokenizer: Tokenizer, name: str
) -> None:
    engine = engine_of(make_config(tmp_path, *EQUAL_AT_FIRST[name]), tokenizer)
    expected = predicted(load_for_evaluation(parent).model)
    assert float((predicted(engine.model) - expected).abs().max()) > 0.1
    initialise_from(parent, engine, tokenizer)
    torch.testing.assert_close(predicted(engine.model), expected, rtol=1e-5, atol=1e-6)


def test_what_is_audible_at_once_is_not_equal(
    make_config: MakeConfig, tmp_path: Path, parent: Path, tokenizer: Tokenizer
) -> None:
    for overrides in (("model.augmentation={}",), ("model.latent.dim=4", "model.latent.inject=embedding")):
        engine = engine_of(make_config(tmp_path, *overrides), tokenizer)
        initialise_from(parent, engine, tokenizer)
        expected = predicted(load_for_evaluation(parent).model)
        assert float((predicted(engine.model) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("averaged", [True, False])
def test_names_in_common_are_taken_over_and_the_rest_starts_as_usual(
    make_config: MakeConfig, tmp_path: Path, tokenizer: Tokenizer, averaged: bool
) -> None:
    theirs = make_config(tmp_path / "run", "train.steps=2", f"train.ema_decay={0.9 * averaged}")
    train(theirs)
    config = make_config(tmp_path, *EQUAL_AT_FIRST["both"])
    engine = engine_of(config, tokenizer)
    usual = weights(engine.model)
    (checkpoint,) = (theirs.path / CHECKPOINTS).glob("step-*")
    taken = weights(load_for_evaluation(theirs.path, averaged=averaged).model)
    for place in (theirs.path, checkpoint):
        sentence = initialise_from(place, engine, tokenizer)
        count = f"{len(taken)} parameters taken over, {len(usual) - len(taken)} new here, 0 not used"
        assert sentence == f"init_from {checkpoint}: {count}"
    for name, tensor in weights(engine.model).items():
        assert torch.equal(tensor, taken.get(name, usual[name])), name
        assert torch.equal(engine.state_dict()["ema"][name], tensor)
        assert not engine.state_dict()["exp_avg"][name].any()
    assert not torch.equal(taken["denoiser.embed.weight"], usual["denoiser.embed.weight"])


def test_a_run_says_what_it_took_and_its_resumes_leave_the_parent_alone(
    make_config: MakeConfig, tmp_path: Path, parent: Path, trace: ReadTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    settings = (*LATENT, f"init_from={tmp_path / 'parent'}", "train.steps=8", "optim.schedule=constant")
    train(make_config(tmp_path / "whole", *settings))
    assert f"init_from {tmp_path}/parent/{CHECKPOINTS}/step-00000003: " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "parent")
    half = f"{CHECKPOINTS}/step-00000004"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "run" / half)
    train(make_config(tmp_path / "run", *settings))
    assert "init_from" not in capsys.readouterr().out
    expected = trace(tmp_path / "whole")
    assert trace(tmp_path / "run") == {step: line for step, line in expected.items() if step > 4}


def test_frozen_parameters_stay_and_have_no_moments(
    make_config: MakeConfig, tmp_path: Path, parent: Path, trace: ReadTrace
) -> None:
    frozen = (*LATENT, f"init_from={parent}", "train.freeze=[denoiser\\.(embed|head|blocks\\.0)\\..*]", "train.steps=8")
    config = make_config(tmp_path / "whole", *frozen)
    train(config)
    before = weights(load_for_evaluation(parent).model)
    for averaged in (True, False):
        after = weights(load_for_evaluation(config.path, averaged=averaged).model)
        kept = {n for n in before if n.startswith(("denoiser.embed.", "denoiser.head.", "denoiser.blocks.0."))}
        assert len(kept) > 8
        for name in kept:
            assert torch.equal(after[name], before[name]), name
        moved = {name for name in before.keys() - kept if not torch.equal(after[name], before[name])}
        assert moved == before.keys() - kept
    tensors = config.path / CHECKPOINTS / "step-00000008" / "tensors"
    saved = dcp.FileSystemReader(tensors).read_metadata().state_dict_metadata
    trained = {n for n in after if not n.startswith(("denoiser.embed.", "denoiser.head.", "denoiser.blocks.0."))}
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {k.removeprefix(f"{moment}.") for k in saved if k.startswith(f"{moment}.")} == trained
    half = f"{CHECKPOINTS}/step-00000004"
    shutil.copytree(config.path / half, tmp_path / "run" / half)
    train(make_config(tmp_path / "run", *frozen))
    expected = trace(config.path)
    assert trace(tmp_path / "run") == {step: line for step, line in expected.items() if step > 4}
    assert all(r["grad_norm"] > 0 for r in read_metrics(config.path / "metrics.jsonl") if r["kind"] == "train")


@pytest.mark.parametrize(
    ("there", "here"),
    [((), ("train.freeze=[denoiser\\..*]",)), (("train.freeze=[denoiser\\..*]",), ())],
)
def test_a_run_that_freezes_otherwise_does_not_go_on(
    make_config: MakeConfig, tmp_path: Path, there: tuple[str, ...], here: tuple[str, ...]
) -> None:
    train(make_config(tmp_path / "run", *LATENT, "train.steps=4", *there))
    with pytest.raises(ValueError, match=r"is a checkpoint of another run \(train\.freeze is"):
        train(make_config(tmp_path / "run", *LATENT, "train.steps=8", *here))


def test_another_tokenizer_is_refused(make_config: MakeConfig, tmp_path: Path, parent: Path) -> None:
    other = make_tokenizer("characters", lambda: iter(["abc"]))
    engine = engine_of(make_config(tmp_path), other)
    with pytest.raises(ValueError, match=r"was trained with another tokenizer: tokenise the data with that one"):
        initialise_from(parent, engine, other)


def test_other_shapes_are_refused(make_config: MakeConfig, tmp_path: Path, parent: Path, tokenizer: Tokenizer) -> None:
    engine = engine_of(make_config(tmp_path, "model.backbone.dim=64"), tokenizer)
    before = weights(engine.model)
    sentence = r"denoiser\.embed\.weight is \(259, 32\) there and \(259, 64\) here: use the same backbone settings"
    with pytest.raises(ValueError, match=sentence):
        initialise_from(parent, engine, tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine.model).items())


def test_a_run_with_nothing_in_common_is_refused(parent: Path, tokenizer: Tokenizer) -> None:
    engine: Any = SimpleNamespace(state_dict=lambda: {"model": {"other": torch.zeros(2)}}, mesh=single_process())
    with pytest.raises(ValueError, match=r"has no parameter in common with this model: use a run of the same backbone"):
        initialise_from(parent, engine, tokenizer)


def test_a_place_without_weights_is_refused_before_a_run_begins(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        train(make_config(tmp_path / "run", f"init_from={tmp_path / 'nowhere'}"))
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("denoizer\\..*", r"'denoizer\\\\\.\.\*' matches no parameter; there are denoiser\.embed\.weight"),
        ("denoiser", r"'denoiser' matches no parameter"),
        (".*", r"leaves nothing to train: free a part of the model"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(
    make_config: MakeConfig, tmp_path: Path, tokenizer: Tokenizer, pattern: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        engine_of(make_config(tmp_path, f"train.freeze=['{pattern}']"), tokenizer)
