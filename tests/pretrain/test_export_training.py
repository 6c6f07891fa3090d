"""Exports beside the training: when they come, that nothing waits for them, and that none of them costs the run.

Run as a script under torchrun it is a training whose exports have several files; every rank writes those that it wrote
to RUN/written-RANK.json.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pretrain.checkpoint import hf, weights
from pretrain.checkpoint.load import CHECKPOINTS
from pretrain.checkpoint.save import checkpoint_name
from pretrain.config import RunConfig
from pretrain.endings import Ending
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks import exports
from pretrain.settings import load_config
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., RunConfig]
EVERY = ("checkpoint.export_every=4", "checkpoint.every=2", "train.steps=10", "validation.every=0")
WHOLE = {"README.md", "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def averaged(checkpoint: Path, tmp_path: Path) -> dict[str, Tensor]:
    """The averaged weights, as PyTorch's own converter reads them."""
    dcp_to_torch_save(checkpoint / "tensors", tmp_path / "all.pt")
    groups = torch.load(tmp_path / "all.pt")
    return {f"model.{name}": tensor for name, tensor in groups["ema"].items()}


def exported(run: Path) -> list[str]:
    """What is there, all of it whole."""
    folders = sorted((run / "exports").iterdir()) if (run / "exports").is_dir() else []
    assert all({path.name for path in folder.iterdir()} >= WHOLE for folder in folders)
    return [folder.name for folder in folders]


def names(*steps: int) -> list[str]:
    return [checkpoint_name(step) for step in steps]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_steps_that_are_due_and_the_last_one_are_exported(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    config = make_config(tmp_path / "run", *EVERY, f"checkpoint.asynchronous={asynchronous}")
    assert train(config) is Ending.FINISHED
    assert exported(config.path) == names(4, 8, 10)
    for name in names(4, 8, 10):
        theirs = averaged(config.path / CHECKPOINTS / name, tmp_path)
        ours = stored(config.path / "exports" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    out, errors = capsys.readouterr()
    assert out.count("penumbra: exported step ") == 3
    assert errors == ""
    assert train(config) is Ending.FINISHED
    assert "exported" not in capsys.readouterr().out


def test_they_have_the_precision_of_the_run(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(tmp_path / "run", *EVERY, "train.precision=bf16", "train.steps=2")
    train(config)
    assert {tensor.dtype for tensor in stored(config.path / "exports" / checkpoint_name(2)).values()} == {
        torch.bfloat16
    }


def test_no_step_and_no_save_waits_for_an_export(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one writes nothing before the last step; the checkpoints after it are sealed all the same."""
    write, step, steps, last = weights.write_tensor_file, FsdpEngine.step, iter(range(1, 99)), threading.Event()
    sealed: list[list[str]] = []

    def held(path: Path, *arguments: Any) -> None:
        assert last.wait(120)
        sealed.append(sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()))
        write(path, *arguments)

    def counted(engine: FsdpEngine, **arguments: Any) -> None:
        step(engine, **arguments)
        if next(steps) == 10:
            last.set()

    monkeypatch.setattr(weights, "write_tensor_file", held)
    monkeypatch.setattr(FsdpEngine, "step", counted)
    config = make_config(tmp_path / "run", *EVERY)
    assert train(config) is Ending.FINISHED
    assert set(names(2, 4, 6)) <= set(sealed[0])
    assert exported(config.path) == names(4, 8, 10)


def test_one_that_fails_costs_nothing_but_itself(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trace: Callable[[Path], dict[int, Any]],
) -> None:
    """A full disk for one of them, an error of our own for another."""
    write = weights.write_tensor_file

    def failing(path: Path, *arguments: Any) -> None:
        if checkpoint_name(4) in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if checkpoint_name(8) in str(path):
            raise LookupError("a mistake")
        write(path, *arguments)

    undisturbed = make_config(tmp_path / "undisturbed", *EVERY, "checkpoint.export_every=0")
    train(undisturbed)
    monkeypatch.setattr(weights, "write_tensor_file", failing)
    config = make_config(tmp_path / "run", *EVERY)
    capsys.readouterr()
    assert train(config) is Ending.FINISHED
    first, second = capsys.readouterr().err.splitlines()
    out = config.path / "exports" / checkpoint_name(4)
    by_hand = f"`penumbra export {config.path} OUT --step 4` makes one"
    assert first == f"penumbra: no export of step 4 in {out} ([Errno 28] No space left on device): {by_hand}"
    assert "no export of step 8" in second
    assert "(a mistake)" in second
    assert exported(config.path) == names(10)
    assert trace(config.path) == trace(undisturbed.path)
    assert exported(undisturbed.path) == []


def test_a_checkpoint_that_is_removed_meanwhile_is_named(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run", *EVERY, "checkpoint.keep=1", "checkpoint.export_every=8")
    source = config.path / CHECKPOINTS / checkpoint_name(8)
    write = weights.write_tensor_file

    def late(path: Path, *arguments: Any) -> None:
        while checkpoint_name(8) in str(path) and source.exists():
            threading.Event().wait(0.01)
        write(path, *arguments)

    monkeypatch.setattr(weights, "write_tensor_file", late)
    assert train(config) is Ending.FINISHED
    assert "(its checkpoint was removed meanwhile): raise checkpoint.keep" in capsys.readouterr().err
    assert exported(config.path) == names(10)


def test_a_run_that_is_stopped_gives_up_its_export(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on, step, steps = exports.Exports._go_on, FsdpEngine.step, iter(range(1, 99))

    def until_given_up(hook: exports.Exports) -> None:
        assert hook.given_up.wait(120)
        go_on(hook)

    def with_signal(engine: FsdpEngine, **arguments: Any) -> None:
        if next(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        step(engine, **arguments)

    config = make_config(tmp_path / "run", *EVERY)
    with monkeypatch.context() as patch:
        patch.setattr(exports.Exports, "_go_on", until_given_up)
        patch.setattr(FsdpEngine, "step", with_signal)
        assert train(config) is Ending.SAVED
    assert exported(config.path) == []
    assert "no export of step 4" in (told := capsys.readouterr().err)
    assert "(the run was stopped)" in told
    (config.path / "exports" / f"{checkpoint_name(4)}{hf.UNFINISHED}").mkdir()
    assert train(config) is Ending.FINISHED
    assert exported(config.path) == names(8, 10)


def test_a_run_that_fails_does_not_wait_for_its_export(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, step, steps = exports.Exports._go_on, FsdpEngine.step, iter(range(1, 99))

    def until_given_up(hook: exports.Exports) -> None:
        assert hook.given_up.wait(120)
        go_on(hook)

    def broken(engine: FsdpEngine, **arguments: Any) -> None:
        if next(steps) == 7:
            raise ZeroDivisionError
        step(engine, **arguments)

    monkeypatch.setattr(exports.Exports, "_go_on", until_given_up)
    monkeypatch.setattr(FsdpEngine, "step", broken)
    with pytest.raises(ZeroDivisionError):
        train(make_config(tmp_path / "run", *EVERY))
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("export")] or [None]
    if thread is not None:
        thread.join(120)
    assert exported(tmp_path / "run") == []


def main(path: Path) -> None:
    """Trains a configuration; its exports have several files."""
    written: list[str] = []
    write = weights.write_tensor_file

    def recorded(place: Path, *arguments: Any) -> None:
        written.append(f"{place.parent.name}/{place.name}")
        write(place, *arguments)

    weights.write_tensor_file = recorded
    exports.ExportSettings = partial(hf.ExportSettings, max_file_bytes=20_000)  # type: ignore[misc, assignment]
    config = load_config(path)
    train(config)
    (config.path / f"written-{os.environ['RANK']}.json").write_text(json.dumps(written))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [(), ("engine=deepspeed", "parallel.zero_stage=3"), ("engine=megatron", "parallel.tensor=2")],
    ids=["fsdp", "deepspeed", "megatron"],
)
def test_two_processes_divide_the_files_among_them(
    tmp_path: Path,
    make_config: MakeConfig,
    write_config: Callable[[RunConfig, Path], Path],
    engine: tuple[str, ...],
) -> None:
    config = make_config(tmp_path / "run", *EVERY, "checkpoint.export_every=8", "data.num_workers=0", *engine)
    path = write_config(config, tmp_path / "run.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([*command, __file__, str(path)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "no export" not in result.stderr
    assert result.stdout.count("exported step 8") == result.stdout.count("exported step 10") == 1
    assert exported(config.path) == names(8, 10)
    written = [set(json.loads((config.path / f"written-{rank}.json").read_text())) for rank in (0, 1)]
    for name in names(8, 10):
        folder = config.path / "exports" / name
        theirs, ours = averaged(config.path / CHECKPOINTS / name, tmp_path), stored(folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        files = {f"{name}{hf.UNFINISHED}/{path.name}" for path in folder.glob("*.safetensors")}
        first, second = (share & files for share in written)
        assert first | second == files
        assert not first & second
        assert abs(len(first) - len(second)) <= 1 <= len(second)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
