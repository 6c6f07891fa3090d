"""Checkpoints: whole or absent, sealed, found again, and refused where they do not fit."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenizers import Tokenizer, make_tokenizer
from model.config import AugmentationConfig, LatentConfig, ModelConfig, TransformerConfig
from pretrain.checkpoint import manifest, verify
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation, newest_good, resume, resume_point
from pretrain.checkpoint.manifest import sealed_in
from pretrain.checkpoint.save import NotSaved, checkpoint_name, save_checkpoint
from pretrain.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.endings import Ending
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from pretrain.state import TrainState
from pretrain.train import train

MODEL = ModelConfig(backbone=TransformerConfig(dim=16, num_layers=1, num_heads=2), vocab_size=259, mask_id=256)


class Interrupted(BaseException):
    """The power goes off."""


class FileOperations:
    """Counts what Python asks of the file system below a folder, and ends one of the requests."""

    EVENTS = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"})

    def __init__(self) -> None:
        self.folder, self.seen, self.last = "", 0, 0
        sys.addaudithook(self._hook)

    @contextmanager
    def until(self, last: int, folder: Path) -> Iterator[None]:
        self.folder, self.seen, self.last = str(folder), 0, last
        try:
            yield
        finally:
            self.folder = ""

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder and event in self.EVENTS and str(arguments[0]).startswith(self.folder):
            self.seen += 1
            if self.seen == self.last:
                self.folder = ""
                raise Interrupted(event)


@pytest.fixture(scope="module")
def operations() -> FileOperations:
    return FileOperations()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer("bytes", lambda: iter(()))


def make_engine(model: ModelConfig = MODEL, *, ema_decay: float = 0.9, seed: int = 0) -> FsdpEngine:
    return FsdpEngine(
        model, OptimConfig(), TrainConfig(ema_decay=ema_decay), ParallelConfig(), single_process(), seed=seed
    )


def fill(engine: FsdpEngine, value: float) -> FsdpEngine:
    """Every tensor of the state gets numbers of its own that tell the value."""
    with torch.no_grad():
        for number, named in enumerate(engine.state_dict().values()):
            for tensor in named.values():
                tensor.fill_(value + number / 8)
    return engine


def save(folder: Path, step: int, *, tokenizer: Tokenizer, keep: int = 9, ema_decay: float = 0.9) -> Path:
    return save_checkpoint(
        folder / CHECKPOINTS,
        fill(make_engine(ema_decay=ema_decay), step).state_dict(),
        TrainState(step=step, tokens=100 * step, skipped=1, resumes=2),
        MODEL,
        single_process().world,
        save_tokenizer=tokenizer.save,
        keep=keep,
    )


def restored(folder: Path) -> tuple[int, dict[str, set[float]]]:
    """Step, and the numbers in each group, of what a resume finds."""
    checkpoint = newest_good(folder / CHECKPOINTS)
    assert checkpoint is not None
    engine = make_engine(seed=3)
    state = resume(checkpoint, engine, MODEL, {})
    numbers = {g: {float(x) for t in n.values() for x in t.unique()} for g, n in engine.state_dict().items()}
    return state.step, numbers


def expected(step: int) -> tuple[int, dict[str, set[float]]]:
    return step, {group: {step + n / 8} for n, group in enumerate(("model", "exp_avg", "exp_avg_sq", "ema"))}


def test_everything_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 5, tokenizer=tokenizer)
    assert path == tmp_path / CHECKPOINTS / checkpoint_name(5)
    engine = make_engine()
    assert resume(path, engine, MODEL, {}) == TrainState(step=5, tokens=500, skipped=1, resumes=2)
    assert {float(s["step"]) for s in engine.optimizer.state.values()} == {4.0}
    assert restored(tmp_path) == expected(5)


def test_a_save_interrupted_anywhere_leaves_a_usable_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer, operations: FileOperations
) -> None:
    first = tmp_path / "first"
    save(first, 1, tokenizer=tokenizer)
    outcomes = []
    for last in range(1, 1000):
        run = tmp_path / f"run{last}"
        shutil.copytree(first, run)
        try:
            with operations.until(last, run):
                save(run, 2, tokenizer=tokenizer, keep=1)
            break
        except BaseException as error:
            if "Interrupted" not in f"{error!r} {error}":
                raise
        step, numbers = restored(run)
        assert (step, numbers) == expected(step)
        outcomes.append(step)
        if last % 4 == 0:
            save(run, 3, tokenizer=tokenizer, keep=1)
            assert restored(run) == expected(3)
            assert [p.name for p in (run / CHECKPOINTS).iterdir()] == [checkpoint_name(3)]
    assert len(outcomes) > 15
    assert set(outcomes) == {1, 2}
    assert outcomes == sorted(outcomes)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, 1, tokenizer=tokenizer)
    (save(tmp_path, 2, tokenizer=tokenizer) / "state.json").unlink()
    assert restored(tmp_path) == expected(1)
    save(tmp_path, 2, tokenizer=tokenizer)
    assert restored(tmp_path) == expected(2)


def test_the_newest_are_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, tokenizer=tokenizer, keep=2)
    assert sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir()) == [checkpoint_name(10), checkpoint_name(11)]


def test_a_good_checkpoint_is_not_given_up_for_a_damaged_later_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, 8, tokenizer=tokenizer)
    (save(tmp_path, 12, tokenizer=tokenizer) / "model.json").unlink()
    save(tmp_path, 10, tokenizer=tokenizer, keep=1)
    assert restored(tmp_path) == expected(10)
    assert [p.name for p in sealed_in(tmp_path / CHECKPOINTS)] == [checkpoint_name(10), checkpoint_name(12)]
    save(tmp_path, 12, tokenizer=tokenizer, keep=1)
    assert restored(tmp_path) == expected(12)
    assert [p.name for p in sealed_in(tmp_path / CHECKPOINTS)] == [checkpoint_name(12)]


def test_half_written_ones_are_ignored_and_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = save(tmp_path, 1, tokenizer=tokenizer)
    for step in (2, 3):
        shutil.copytree(good, good.with_name(f"{checkpoint_name(step)}.tmp"))
    assert restored(tmp_path) == expected(1)
    save(tmp_path, 3, tokenizer=tokenizer)
    assert sorted(p.name for p in good.parent.iterdir()) == [checkpoint_name(1), checkpoint_name(3)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_any_damaged_file_sends_back_to_the_previous_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, tokenizer=tokenizer)
    path = save(tmp_path, 2, tokenizer=tokenizer)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    assert {file.name for file in files} >= {"model.json", "state.json", "tokenizer.json", ".metadata"}
    for file in files:
        kept = file.read_bytes()
        harm(file)
        assert newest_good(path.parent) == path.with_name(checkpoint_name(1))
        message = capsys.readouterr().err
        assert message.startswith(f"penumbra: passing over checkpoint {path.name}: {file}")
        with pytest.raises(ValueError, match="is damaged"):
            load_for_evaluation(path)
        file.write_bytes(kept)
    assert newest_good(path.parent) == path


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 1}'])
def test_without_its_seal_a_checkpoint_is_none(tmp_path: Path, tokenizer: Tokenizer, content: str | None) -> None:
    save(tmp_path, 1, tokenizer=tokenizer)
    seal = save(tmp_path, 2, tokenizer=tokenizer) / "manifest.json"
    seal.unlink() if content is None else seal.write_text(content)
    assert restored(tmp_path) == expected(1)


def test_where_nothing_is_good_nothing_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert newest_good(tmp_path / CHECKPOINTS) is None
    assert resume_point(tmp_path / CHECKPOINTS) is None
    flip(save(tmp_path, 1, tokenizer=tokenizer) / "state.json")
    assert newest_good(tmp_path / CHECKPOINTS) is None


@pytest.mark.parametrize("reason", ["a stale handle", "another format"])
def test_a_run_does_not_begin_anew_over_checkpoints_that_it_can_not_use(
    tmp_path: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    config = make_config(tmp_path / "run", "train.steps=4", "checkpoint.every=2")
    train(config)
    there = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    if reason == "a stale handle":
        monkeypatch.setattr(verify, "sha256_of", stale)
    else:
        monkeypatch.setattr(manifest, "FORMAT", 2)
    longer = make_config(tmp_path / "run", "train.steps=8", "checkpoint.every=2")
    with pytest.raises(ValueError, match=r"none can be used \(step-00000002, step-00000004; the reasons stand above\)"):
        train(longer)
    assert {path: path.read_bytes() for path in there} == there
    monkeypatch.undo()
    assert train(longer) is Ending.FINISHED
    assert load_for_evaluation(tmp_path / "run").state.step == 8


def stale(path: Path) -> str:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def test_another_model_is_refused_by_its_differences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer=tokenizer)
    other = replace(MODEL, backbone=replace(MODEL.backbone, dim=32), loss_weight="uniform")
    engine = make_engine(other)
    before = {n: t.clone() for n, t in engine.state_dict()["model"].items()}
    with pytest.raises(ValueError, match="checkpoint of another model") as caught:
        resume(path, engine, other, {})
    assert "model.backbone.dim is 16 there and 32 here" in str(caught.value)
    assert "model.loss_weight is elbo there and uniform here" in str(caught.value)
    assert "model.mask_id" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in engine.state_dict()["model"].items())


@pytest.mark.parametrize(
    "switch",
    [{"latent": LatentConfig(dim=2, inject="embedding")}, {"augmentation": AugmentationConfig()}, {"block_size": 4}],
)
def test_a_model_with_another_switch_is_another_model(
    tmp_path: Path, tokenizer: Tokenizer, switch: dict[str, Any]
) -> None:
    (name,) = switch
    other = replace(MODEL, **switch)
    for there, here in ((MODEL, other), (other, MODEL)):
        folder = tmp_path / ("on" if here is MODEL else "off")
        path = save_checkpoint(
            folder / CHECKPOINTS,
            make_engine(there).state_dict(),
            TrainState(step=1),
            there,
            single_process().world,
            save_tokenizer=tokenizer.save,
            keep=1,
        )
        with pytest.raises(ValueError, match=rf"checkpoint of another model \(.*model\.{name}"):
            resume(path, make_engine(here), here, {})
        assert resume(path, make_engine(there), there, {}).step == 1


def test_an_average_that_is_not_there_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer=tokenizer, ema_decay=0.0)
    with pytest.raises(ValueError, match=r"no averaged weights: set train\.ema_decay=0"):
        resume(path, make_engine(), MODEL, {})
    engine = make_engine(ema_decay=0.0)
    assert resume(path, engine, MODEL, {}).step == 1
    resume(save(tmp_path, 2, tokenizer=tokenizer), engine, MODEL, {})
    assert {float(x) for x in engine.state_dict()["model"]["denoiser.embed.weight"].unique()} == {2.0}


def weights(run: Path, *, averaged: bool) -> set[float]:
    loaded = load_for_evaluation(run, averaged=averaged)
    return {float(x) for p in loaded.model.parameters() for x in p.detach().unique()}


def test_evaluation_takes_the_average_where_there_is_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "both", 4, tokenizer=tokenizer)
    assert weights(tmp_path / "both", averaged=True) == {4 + 3 / 8}
    assert weights(tmp_path / "both", averaged=False) == {4.0}
    save(tmp_path / "plain", 4, tokenizer=tokenizer, ema_decay=0.0)
    assert weights(tmp_path / "plain", averaged=True) == {4.0}


def test_tokenizer_and_model_travel(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(tmp_path, 3, tokenizer=tokenizer)
    path = save(tmp_path, 4, tokenizer=tokenizer)
    moved = tmp_path / "elsewhere"
    shutil.copytree(path, moved)
    for place in (tmp_path, path, moved):
        loaded = load_for_evaluation(place)
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.sha256() == tokenizer.sha256()
        assert loaded.model.config == MODEL
        assert loaded.state.step == 4
        assert not loaded.model.training
        assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in loaded.model.parameters())


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder \(it does not exist\)"):
        load_for_evaluation(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a run folder with a usable checkpoint: train it first"):
        load_for_evaluation(tmp_path)


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(NotSaved, match=r"the checkpoint of step 1 can not be written to .*run/checkpoints \(.*run"):
        save(tmp_path / "run", 1, tokenizer=tokenizer)


def test_the_seal_lists_every_file_and_the_names_are_canonical(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    path = save(tmp_path, 1, tokenizer=tokenizer)
    seal = json.loads((path / "manifest.json").read_text())
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    assert set(seal["files"]) == files - {"manifest.json"}
    saved = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
    names = [name for name, _ in make_engine().model.named_parameters()]
    assert set(saved) == {f"{group}.{name}" for group in ("model", "exp_avg", "exp_avg_sq", "ema") for name in names}
    shapes = {name: tuple(t.shape) for name, t in make_engine().model.named_parameters()}
    assert {name: tuple(saved[f"ema.{name}"].size) for name in names} == shapes  # type: ignore[union-attr]
