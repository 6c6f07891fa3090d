"""What the hooks leave in a run's folder, and what they refuse before a run begins."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from model.collapse import LatentReport
from pretrain.config import RunConfig, TrainConfig
from pretrain.hooks.base import StepRecord
from pretrain.hooks.collapse_warning import PATIENCE, CollapseWarning
from pretrain.hooks.config_file import ConfigFile
from pretrain.hooks.metrics import MetricsFile
from pretrain.hooks.wandb import WandbRun
from pretrain.sole_run import LOCK
from pretrain.state import TrainState
from pretrain.train import make_hooks, train
from pretrain.writable import check_writable

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(
    tmp_path: Path, make_config: MakeConfig, name: str
) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{name} can not be written \(it is a folder\)"):
        train(make_config(tmp_path / "run", "train.steps=1"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {name, LOCK}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_what_is_write_protected_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(tmp_path)
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).touch(0o400)
    with pytest.raises(ValueError, match="it is write-protected"):
        MetricsFile(tmp_path / "metrics.jsonl", {})
    with pytest.raises(ValueError, match="it is write-protected"):
        ConfigFile(config)
    (tmp_path / "closed").mkdir(0o500)
    with pytest.raises(ValueError, match="closed is write-protected"):
        check_writable(tmp_path / "closed" / "a" / "b")


def test_looking_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(None, tmp_path / "file", tmp_path / "new", tmp_path / "a" / "b" / "new")
    with pytest.raises(ValueError, match="file is not a folder"):
        check_writable(tmp_path / "new", tmp_path / "file" / "b" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_resume_names_what_is_set_otherwise(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps, folder, resumed in ((4, "run", False), (4, "run", True), (6, "run", True)):
        config = make_config(tmp_path / folder, f"train.steps={steps}", f"optim.lr={1e-3 * steps}")
        config.path.mkdir(exist_ok=True)
        ConfigFile(config).on_start(TrainState(), resumed=resumed)
        told = capsys.readouterr().err
        assert bool(told) == (steps == 6)
    assert told == (
        "penumbra: settings that differ from those so far: optim.lr=0.006 (was 0.004); train.steps=6 (was 4)\n"
    )


def test_wandb_continues_a_run_by_an_id_of_its_own(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    def init(**settings: Any) -> SimpleNamespace:
        opened.append(settings)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder in ("a/run", "a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        config = make_config(tmp_path / folder, "log.wandb_project=p")
        WandbRun(config, {"parameters": 7}).on_start(TrainState(), resumed=False)
    first, again, other = (settings["id"] for settings in opened)
    assert first == again != other
    assert (tmp_path / "a" / "run" / "wandb_id").read_text() == first
    assert opened[0]["config"]["parameters"] == 7
    assert opened[0]["config"]["model"]["backbone"]["dim"] == 32
    assert [path.name for path in (tmp_path / "b" / "run").iterdir()] == ["wandb_id"]


def test_wandb_keeps_the_lines_of_steps_that_come_again(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B drops a line whose step is below an earlier one's: the steps are a number among the others."""
    told = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: told))
    (tmp_path / "run").mkdir()
    hook = WandbRun(make_config(tmp_path / "run", "log.wandb_project=p"), {})
    hook.on_start(TrainState(), resumed=False)
    for step in (4, 8, 6):
        hook.on_log(line(step, None))
    hook.on_finish(TrainState())
    told.define_metric.assert_called_once_with("*", step_metric="step")
    assert [call.args[0]["step"] for call in told.log.call_args_list] == [4, 8, 6]
    assert all(not call.kwargs for call in told.log.call_args_list)
    assert told.log.call_args_list[0].args[0]["train/loss"] == 1.0
    told.finish.assert_called_once_with()


def line(step: int, kl: float | None) -> StepRecord:
    latent = None if kl is None else LatentReport(kl, 0, 0.0)
    return StepRecord(step, 1.0, 1.0, 1.0, 1e-3, 0, 0, 1.0, None, latent)


def said_at(
    kls: list[float | None], capsys: pytest.CaptureFixture[str], warmup_steps: int = 0, **settings: float
) -> list[int]:
    """The steps, ten apart, after which something was printed."""
    hook = CollapseWarning(TrainConfig(**settings), warmup_steps=warmup_steps)  # type: ignore[arg-type]
    steps = []
    for number, kl in enumerate(kls, start=1):
        hook.on_log(line(10 * number, kl))
        if capsys.readouterr().err:
            steps.append(10 * number)
    return steps


def test_a_silent_latent_is_named_once_after_its_annealing(capsys: pytest.CaptureFixture[str]) -> None:
    silent: list[float | None] = [0.01] * 40
    assert said_at(silent, capsys) == [10 * PATIENCE]
    assert said_at(silent, capsys, kl_anneal_steps=100) == [100 + 10 * PATIENCE]
    assert said_at(silent, capsys, kl_anneal_steps=100, kl_hold_steps=50) == [150 + 10 * PATIENCE]
    assert said_at(silent, capsys, warmup_steps=70) == [70 + 10 * PATIENCE]
    assert said_at(silent, capsys, warmup_steps=70, kl_anneal_steps=100) == [100 + 10 * PATIENCE]
    assert said_at([0.0499] * 40, capsys) == [10 * PATIENCE]
    assert said_at([0.051] * 40, capsys) == []
    assert said_at([*silent[: PATIENCE - 1], 2.0, *silent], capsys) == [20 * PATIENCE]
    assert said_at([None] * 40, capsys) == []


def test_the_sentence_about_a_silent_latent_says_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    hook = CollapseWarning(TrainConfig(kl_anneal_steps=7, kl_weight=2.0))
    for step in range(8, 8 + PATIENCE):
        hook.on_log(line(step, 0.02))
    (text,) = capsys.readouterr().err.splitlines()
    for part in ("KL 0.020", f"step {7 + PATIENCE}", "train.kl_anneal_steps (now 7)", "train.kl_weight (now 2)"):
        assert part in text


def test_only_runs_with_a_latent_are_watched_for_collapse(tmp_path: Path, make_config: MakeConfig) -> None:
    latent = ("model.latent.dim=2", "model.latent.inject=embedding")
    for overrides, number in (((), 0), (latent, 1)):
        hooks = make_hooks(make_config(tmp_path, *overrides), 1, 1)
        assert sum(isinstance(hook, CollapseWarning) for hook in hooks) == number
