"""`penumbra export`: what it writes, and one sentence for every mistake, with nothing left behind."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launchers.cli import main
from pretrain.checkpoint import weights
from pretrain.config import RunConfig
from pretrain.train import train

Penumbra = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., RunConfig]) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(make_config(folder, "train.steps=4", "checkpoint.every=2", "validation.every=0"))
    return folder


@pytest.fixture
def penumbra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Penumbra:
    """`penumbra export ARGUMENTS` in a folder of its own: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penumbra", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, errors = capsys.readouterr()
        return int(end.value.code or 0), out, errors

    return call


def test_it_exports_the_step_the_weights_and_the_numbers_that_are_asked_for(
    penumbra: Penumbra, run: Path, tmp_path: Path
) -> None:
    checkpoints = run / "checkpoints"
    code, out, errors = penumbra(run, "newest")
    assert (code, errors) == (0, "")
    assert out == f"exported {checkpoints / 'step-00000004'} (averaged weights, fp32) to newest\n"
    code, out, errors = penumbra(run, "exports/other", "--step", "2", "--dtype", "bf16", "--weights", "raw")
    assert (code, errors) == (0, "")
    assert out == f"exported {checkpoints / 'step-00000002'} (weights as trained, bf16) to exports/other\n"
    assert penumbra(checkpoints / "step-00000002", "same", "--dtype", "bf16", "--weights", "raw")[0] == 0
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "exports/other" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert json.loads((tmp_path / "same/config.json").read_text())["dtype"] == "bfloat16"
    newest, other = (load_file(tmp_path / folder / name) for folder in ("newest", "same"))
    assert newest.keys() == other.keys()
    assert "| step | 2 (1,024 tokens) |" in (tmp_path / "same/README.md").read_text()


def test_a_checkpoint_without_tokenizer_is_exported_and_said_to_have_none(
    penumbra: Penumbra, run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run / "checkpoints/step-00000004", tmp_path / "bare")
    shutil.rmtree(copy / "tokenizer")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"].pop("tokenizer/tokenizer.json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = penumbra("bare", "out")
    assert code == 0
    assert out.splitlines()[1].startswith("the checkpoint has no tokenizer, so the folder has none")
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_what_can_not_be_exported_is_refused(
    penumbra: Penumbra, run: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    train(make_config(tmp_path / "plain", "train.steps=1", "train.ema_decay=0", "validation.every=0"))
    damaged = shutil.copytree(run, tmp_path / "damaged") / "checkpoints/step-00000002/model.json"
    damaged.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for arguments, sentence in (
        ((run, "there"), "there exists: choose another place, or remove it first"),
        ((run, "file"), "file exists: choose another place"),
        ((run, "file/out"), "file/out can not be written (file is not a folder)"),
        (("nowhere", "out"), "nowhere is not a run folder (it does not exist)"),
        (("empty", "out"), "empty is not a run folder with a usable checkpoint: train it first"),
        ((run, "out", "--step", "3"), "has no checkpoint of step 3, only of these: 2, 4"),
        ((run / "checkpoints/step-00000004", "out", "--step", "4"), "is a checkpoint: drop --step"),
        (("empty", "out", "--step", "3"), "empty has no checkpoint of step 3, only of these: none"),
        (("damaged", "out", "--step", "2"), "checkpoint damaged/checkpoints/step-00000002 is damaged"),
        (("plain", "out", "--weights", "ema"), "has no averaged weights (train.ema_decay=0): export those as trained"),
    ):
        code, _, errors = penumbra(*arguments)
        assert code == 2
        assert errors.startswith("penumbra: ")
        assert sentence in errors
        assert len(errors.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_said_and_nothing_stays(
    penumbra: Penumbra, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *arguments: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "write_tensor_file", full)
    code, _, errors = penumbra(run, "out")
    assert code == 2
    assert errors.startswith("penumbra: nothing was exported to out ([Errno 28] No space left on device): make room")
    assert not list(tmp_path.iterdir())
