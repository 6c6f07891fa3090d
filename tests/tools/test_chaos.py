"""Chaos: what is drawn, what is compared, and that a difference of one bit is one."""

import json
import os
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import engines
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.verify import damage
from pretrain.config import RunConfig
from pretrain.train import train
from tools import chaos
from tools.chaos import disk
from tools.chaos.comparison import differences, newest_checkpoint, tensor_differences
from tools.chaos.damage import damage_file
from tools.chaos.faults import KILLS, KINDS, Damage, FillDisk, Kill, Terminate, Trial, draw, parse_kinds
from tools.chaos.outcome import Outcome, start_problems, told_of_a_skip
from tools.chaos.poisoned import PoisonedEngine
from tools.chaos.processes import MARK, left_over
from tools.chaos.reference import Pace, Reference
from tools.chaos.run_folder import RunFolder
from tools.chaos.tiny_run import tiny_run
from tools.chaos.trial import History

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    """A finished run."""
    config = make_config(tmp_path_factory.mktemp("chaos") / "run")
    train(config)
    return config.path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same run once more, to be spoilt."""
    return shutil.copytree(run, tmp_path / "copy")


def test_a_trial_depends_on_seed_kinds_and_number_alone() -> None:
    first, second = ([draw(number, KINDS, 0) for number in range(1, 41)] for _ in range(2))
    assert first == second
    assert draw(17, KINDS, 0) == first[16]
    assert [trial.kind for trial in first[:9]] == [*KINDS, KINDS[0]]
    others = [draw(number, KINDS, 1) for number in range(1, 41)]
    assert all(ours.faults != theirs.faults for ours, theirs in zip(first, others))


def test_everything_that_can_happen_is_drawn() -> None:
    trials = [draw(number, KINDS, 0) for number in range(1, 801)]
    faults = [(trial.kind, fault) for trial in trials for fault in trial.faults]
    moments = [fault.moment for _, fault in faults]
    assert min(moments) < 0.02
    assert 0.98 < max(moments) < 1
    victims = {kind: {f.victim for k, f in faults if k == kind and isinstance(f, Kill)} for kind in KILLS}
    assert victims == {
        "kill-one": {0, 1},
        "kill-all": {"ranks", "everything"},
        "kill-in-save": {0, 1, "ranks", "everything"},
    }
    assert {f.victim for _, f in faults if isinstance(f, Terminate)} == {0, 1, "torchrun"}
    assert {trial.poison.rank for trial in trials if trial.poison} == {0, 1}
    assert {len(trial.faults) for trial in trials if trial.kind in KILLS} == {1, 2}
    assert any(f.room == 0 for _, f in faults if isinstance(f, FillDisk))
    assert {(kind, f.how) for kind, f in faults if isinstance(f, Damage)} == {
        (k, k) for k in ("bit-flip", "truncation")
    }
    into = [f.into_save for _, f in faults if isinstance(f, Kill) and f.into_save is not None]
    assert all(isinstance(f, Kill) and f.into_save is not None for kind, f in faults if kind == "kill-in-save")
    assert min(into) < 0.1 < 0.9 < max(into) < 1


def test_kinds_by_name() -> None:
    assert parse_kinds("kill") == KILLS
    assert parse_kinds("nan, kill-all,sigterm") == ("kill-all", "sigterm", "nan")
    assert parse_kinds("all") == KINDS
    with pytest.raises(ValueError, match=r"'earthquake' is not a kind of fault: use some of kill-one, .*nan, or kill"):
        parse_kinds("kill,earthquake")


def test_a_run_is_identical_to_itself(run: Path, copy: Path) -> None:
    assert differences(copy, run) == []


def change_line(run: Path, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the train line of a step."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if (line["kind"], line["step"]) == ("train", step):
            change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def next_float(value: float) -> float:
    """With one more in its last bit."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return float(struct.unpack("<d", struct.pack("<q", bits + 1))[0])


def test_one_bit_in_one_step_is_found(run: Path, copy: Path) -> None:
    change_line(copy, 7, lambda line: line.update(loss=next_float(line["loss"])))
    (sentence,) = differences(copy, run)
    assert sentence.startswith("step 7: train loss is ")
    assert differences(copy, run, apart_from={("train", 7, "loss")}) == []
    assert len(differences(copy, run, apart_from={("train", 8, "loss")})) == 1


def test_a_step_that_was_repeated_otherwise_is_found(run: Path, copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    repeated = next(json.loads(line) for line in lines if '"train"' in line and json.loads(line)["step"] == 5)
    other = {**repeated, "grad_norm": next_float(repeated["grad_norm"])}
    (copy / "metrics.jsonl").write_text("\n".join([json.dumps(other), *lines]) + "\n")
    assert [sentence[:24] for sentence in differences(copy, run)] == ["step 5: train grad_norm "]


def test_a_missing_step_is_found(run: Path, copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if (json.loads(line)["kind"], json.loads(line)["step"]) != ("train", 3)]
    (copy / "metrics.jsonl").write_text("".join(kept))
    assert "step 3: train loss is missing" in differences(copy, run)


def test_another_seed_is_another_run(run: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(tmp_path / "other", "seed=1")
    train(config)
    told = " ".join(differences(config.path, run))
    assert "step 1: train loss is" in told
    assert "ema." in told
    assert "numbers" in told


def test_tensors_are_compared_by_their_bits() -> None:
    ours = {"a": torch.tensor([0.0, float("nan"), 1.0]), "b": torch.ones(2, 2), "c": torch.ones(3)}
    assert tensor_differences(ours, {name: tensor.clone() for name, tensor in ours.items()}) == []
    theirs = {"a": torch.tensor([-0.0, float("nan"), 1.0]), "b": torch.ones(4), "d": torch.ones(3)}
    assert tensor_differences(ours, theirs) == [
        "a differs in 1 of 3 numbers",
        "b has another shape or type",
        "c is only in the run",
        "d is only in the reference",
    ]


@pytest.mark.parametrize("how", ["bit-flip", "truncation"])
def test_damage_is_where_it_was_drawn_and_is_noticed(copy: Path, tmp_path: Path, how: str) -> None:
    """In every file of a checkpoint; in its seal, whose own bits nothing seals, if it is cut off."""
    checkpoint = newest_checkpoint(copy)
    assert checkpoint is not None
    names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    assert len(names) > 5
    for number, name in enumerate(names):
        spoilt = shutil.copytree(checkpoint, tmp_path / f"spoilt-{number}" / checkpoint.name)
        damaged = damage_file(spoilt, how, (number + 0.5) / len(names), 0.6)
        assert damaged == spoilt / name
        before, after = (checkpoint / name).read_bytes(), damaged.read_bytes()
        if how == "truncation":
            assert after == before[: int(0.6 * 8 * len(before)) // 8]
        else:
            assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
        if name != MANIFEST or how == "truncation":
            assert damage(spoilt) is not None, name
    assert damage(checkpoint) is None


def test_a_restart_must_go_on_from_the_newest_sealed_checkpoint() -> None:
    history = History(goes_on_from=[{8}, {12, 16}])
    assert start_problems([0, 8, 16], history) == []
    assert start_problems([0, 8, 12], history) == []
    assert start_problems([0, 4, 12], history) == [
        "restart 1 went on from step 4, the newest sealed checkpoint was of step 8"
    ]
    assert "it was started at steps [0, 8], after 2 interruptions" in start_problems([0, 8], history)
    assert start_problems([0, 12], History(at_least=8)) == []
    assert start_problems([0, 4], History(at_least=8)) == ["it went on from step 4, not 8"]


def event(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_a_run_is_followed_as_it_writes(tmp_path: Path) -> None:
    """What a killed process has left of a save is not a save under way, until the run gets there again."""
    run, saves = RunFolder(tmp_path), tmp_path / "checkpoints"
    run.look()
    assert (run.step, run.starts) == (None, [])
    event(tmp_path, '{"kind": "event", "event": "start", "step": 0}\n{"kind": "train", "step": 1}\n{"kind": "tra')
    run.look()
    assert run.step == 1
    event(tmp_path, 'in", "step": 2}\n')
    (saves / "step-00000002.tmp").mkdir(parents=True)
    run.look()
    assert (run.step, run.saves_under_way(), run.sealed(), run.newest_step()) == (2, [2], [], 0)
    event(tmp_path, '{"kind": "train", "st')
    run.expect_start()
    assert (run.step, run.saves_under_way()) == (None, [])
    event(tmp_path, '\n{"kind": "event", "event": "start", "step": 0}\n{"kind": "train", "step": 1}\n')
    run.look()
    assert (run.step, run.starts, run.saves_under_way()) == (1, [0, 0], [])
    event(tmp_path, '{"kind": "train", "step": 2}\n')
    (saves / "step-00000002").mkdir()
    (saves / "step-00000002" / MANIFEST).touch()
    run.look()
    assert (run.saves_under_way(), run.newest_step()) == ([2], 2)


def test_a_skipped_step_is_a_step_whose_update_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another step's, and not without a trace."""
    runs = {}
    for name, step, rank in (("nan", 5, 0), ("left-out", 5, None), ("other", 6, None)):
        monkeypatch.setattr(engines, "make_engine", partial(PoisonedEngine, step=step, rank=rank))
        runs[name] = tiny_run(tmp_path / name).path
        train(tiny_run(tmp_path / name))
    apart_from = told_of_a_skip(5)
    assert differences(runs["nan"], runs["left-out"], apart_from=apart_from) == []
    assert differences(runs["nan"], runs["left-out"])[0].startswith("step 5: train grad_norm is nan")
    assert differences(runs["nan"], runs["other"], apart_from=apart_from)[0].startswith("step 6: train loss is ")


def stand_in(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Trials that come to nothing, of which some went wrong."""

    def conduct(trial: Trial, folder: Path, reference: Reference) -> Outcome:
        problems = ["step 3: train loss is missing"] if trial.number in bad else []
        return Outcome(trial, History(kills=2, kills_in_save=1), problems, restarts=2, repeated=5, seconds=60.0)

    monkeypatch.setattr(chaos, "conduct", conduct)
    monkeypatch.setattr(chaos, "undisturbed", lambda folder: Reference(folder, Pace(0.1, 0.1, 5.0), 1000))


def test_the_record_the_table_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, 2)
    settings: Any = {"seed": 3, "kinds": "kill-one,nan", "folder": tmp_path / "runs", "json_file": tmp_path / "j.json"}
    assert chaos.run_chaos(trials=4, **settings) == 1
    said = capsys.readouterr().out
    assert "trial   2  nan           DIFFERENT  2 killed (1 inside a save), 2 restarts, 5 steps repeated, 60 s" in said
    assert "step 3: train loss is missing" in said
    assert f"penumbra chaos --seed 3 --kinds kill-one,nan --folder {tmp_path / 'runs'} --only 2" in said
    rows = [line.split() for line in said.splitlines()[-3:]]
    assert rows[0] == ["kill-one", "2", "2", "4", "2", "4", "10", "0", "0"]
    assert rows[1][:3] == ["nan", "2", "1"]
    assert rows[2][:3] == ["all", "4", "3"]
    results = json.loads((tmp_path / "j.json").read_text())["results"]
    assert results["chaos.identical_fraction"] == 0.75
    assert results["chaos.kill_one.identical_fraction"] == 1.0
    assert results["chaos.kills_in_save"] == 4
    assert chaos.run_chaos(trials=1, only=3, **settings) == 0
    assert "trial   3  kill-one" in capsys.readouterr().out


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trial-1").mkdir()
    with pytest.raises(ValueError, match="holds something else: choose another --folder"):
        chaos.run_chaos(trials=1, seed=0, kinds="kill", folder=tmp_path)
    assert (tmp_path / "trial-1").exists()


def test_trials_that_still_run_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    chaos.run_chaos(trials=1, seed=0, kinds="kill", folder=tmp_path / "runs")
    environment = {**os.environ, MARK: str(tmp_path / "runs" / "trial-001")}
    with subprocess.Popen(["sleep", "600"], env=environment) as process:
        while left_over(tmp_path / "runs") != [process.pid]:
            assert process.poll() is None
        assert left_over(tmp_path / "run") == left_over(tmp_path / "other") == []
        with pytest.raises(ValueError, match=rf"has trials that still run \(process {process.pid}\)"):
            chaos.run_chaos(trials=1, seed=0, kinds="kill", folder=tmp_path / "runs")
        process.kill()
    chaos.run_chaos(trials=1, seed=0, kinds="kill", folder=tmp_path / "runs")


def test_without_a_disk_to_fill_it_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*command: str) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="mount: permission denied\n")

    stand_in(monkeypatch)
    monkeypatch.setattr(disk, "_run", refuse)
    with pytest.raises(ValueError, match=r"can not be mounted at .*permission denied\): run it as root, or leave"):
        chaos.run_chaos(trials=1, seed=0, kinds="full-disk", folder=tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_are_killed_and_come_out_the_same(tmp_path: Path) -> None:
    """One rank at a random moment, and whatever is drawn inside a save."""
    code = chaos.run_chaos(
        trials=2, seed=0, kinds="kill-one,kill-in-save", folder=tmp_path / "runs", json_file=tmp_path / "chaos.json"
    )
    results = json.loads((tmp_path / "chaos.json").read_text())["results"]
    assert code == 0
    assert results["chaos.identical_fraction"] == 1.0
    assert results["chaos.kills"] == results["chaos.restarts"] >= 2
    assert Counter(path.name for path in (tmp_path / "runs").iterdir()) == Counter(["chaos.json", "undisturbed"])
