"""Reproductions train once, go on where they were cut off, and put numbers over seeds beside the paper's."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import tools.reproduce as framework
from data_pipeline.synthetic import support
from eval.synthetic import accuracy, kl
from launchers.cli import main
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from pretrain.checkpoint.load import CHECKPOINTS, newest_good
from pretrain.endings import Ending
from pretrain.hooks.metrics import read_metrics
from pretrain.recipes import build
from pretrain.settings import dump_config
from pretrain.train import train
from tools.chaos.processes import ROOT, is_alive
from tools.reproduce import samples, training
from tools.reproduce.figures import Bar, bars_against_paper
from tools.reproduce.samples import ARGMAX, CATEGORICAL, complete, draw
from tools.reproduce.table import Budget, Reproduction, Results, as_markdown, as_rich, over_seeds, rows_of, split
from tools.reproduce.training import Job, Runs, train_all

SMALL = (
    "model.backbone.num_layers=1",
    "train.batch_tokens=32",
    "validation.num_sequences=8",
    "checkpoint.keep=9",
    "log.every=1",
)
MDM = Job("two_token_deterministic_mdm", (*SMALL, "train.steps=60", "checkpoint.every=6"))
VMD = Job("two_token_deterministic_vmd", (*SMALL, "train.steps=4", "model.backbone.gates=one"), after="pairs.mdm")
TRACED = ("loss", "ce", "grad_norm", "lr", "tokens")


def measure(runs: Runs, seed: int) -> Results:
    """Accuracy and KL of a few samples."""
    patterns_PL, probabilities_P = support("deterministic")
    results = {}
    for system, policies in (("mdm", CATEGORICAL), ("vmd", ARGMAX)):
        samples_NL = draw(runs[f"pairs.{system}"].model, 500, 2, policies, 1, seed=seed)
        results[f"pairs.one_step.{system}.accuracy"] = accuracy(samples_NL, patterns_PL)
        results[f"pairs.one_step.{system}.kl"] = kl(patterns_PL, probabilities_P, samples_NL)
    return results


def figure(runs: Runs, results: Results, folder: Path) -> None:
    """One bar for each accuracy."""
    bars = [Bar(setting="pairs", system=key, value=value) for key, value in results.items() if key.endswith("accuracy")]
    bars_against_paper(folder / "small-accuracy.png", bars, xlabel="accuracy", title="Small")


SMALL_TABLE = Reproduction(
    name="small",
    summary="a run, and one that starts from it",
    jobs=lambda budget: {"pairs.vmd": VMD, "pairs.mdm": MDM},
    measure=measure,
    draw=figure,
    paper={"pairs.one_step.mdm.accuracy": 0.1018},
    notes=("A note.",),
)


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and short waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "POLL_SECONDS", 0.02)


def reproduce_small(patch: pytest.MonkeyPatch, *, seeds: int = 1, **changes: Any) -> dict[str, Any]:
    """The JSON of the small table after `penumbra reproduce small`."""
    patch.setattr(framework, "reproductions", lambda: {"small": replace(SMALL_TABLE, **changes)})
    framework.reproduce("small", "quick", seeds=seeds, out=Path("out"), json_file=Path("also/numbers.json"))
    text = Path("out/small.json").read_text()
    assert json.loads(Path("also/numbers.json").read_text())["results"] == json.loads(text)["results"]
    record: dict[str, Any] = json.loads(text)
    return record


@dataclass(frozen=True)
class History:
    """The small table: cut off by Ctrl-C, finished, and asked for once more."""

    place: Path
    cut_off: list[subprocess.Popen[bytes]]
    left_behind: list[str]
    started: list[str]
    record: dict[str, Any]
    printed: str
    started_again: list[str]
    again: dict[str, Any]

    @property
    def runs(self) -> Path:
        """The folder of the trained runs."""
        return self.place / "runs/reproduce/small-quick/seed-0"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Processes of their own train, so this takes seconds."""
    place, children = tmp_path_factory.mktemp("reproduce"), list[subprocess.Popen[bytes]]()
    runs = Path("runs/reproduce/small-quick/seed-0")

    def start(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen(*arguments, **named))
        return children[-1]

    def recipes_started() -> list[str]:
        return [str(process.args[3]) for process in children]  # type: ignore[index]

    def press_ctrl_c(seconds: float) -> None:
        time.sleep(seconds)
        if newest_good(runs / "pairs.mdm" / CHECKPOINTS) is not None:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(place)
        patch.setattr(training, "POLL_SECONDS", 0.02)
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(training, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
        with pytest.MonkeyPatch.context() as hand:
            hand.setattr(training, "time", SimpleNamespace(sleep=press_ctrl_c))
            inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
            try:
                with pytest.raises(KeyboardInterrupt):
                    reproduce_small(patch)
            finally:
                signal.signal(signal.SIGINT, inherited)
        cut_off, left_behind = [*children], [path.name for path in place.iterdir()]
        children.clear()
        record, started = reproduce_small(patch), recipes_started()
        children.clear()
        again, started_again = reproduce_small(patch), recipes_started()
    return History(place, cut_off, left_behind, started, record, printed.getvalue(), started_again, again)


def test_ctrl_c_ends_the_processes_and_leaves_only_the_runs(history: History) -> None:
    assert [process.poll() for process in history.cut_off] == [Ending.SAVED]
    assert history.left_behind == ["runs"]


def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(history: History) -> None:
    assert history.started == [MDM.recipe, VMD.recipe]
    lines = read_metrics(history.runs / "pairs.mdm/metrics.jsonl")
    (resumed,) = (line["step"] for line in lines if line.get("event") == "resume")
    assert 0 < resumed < 60
    train(build(MDM.recipe, [*MDM.overrides, "folder=whole", "seed=0"]))
    cut, whole = losses(history.runs / "pairs.mdm"), losses(Path("whole"))
    assert len(whole) == 60
    assert cut.keys() == whole.keys()
    for step in whole:
        assert cut[step] == pytest.approx(whole[step], rel=1e-4), f"step {step}"


def losses(folder: Path) -> dict[int, list[float]]:
    """What a run logged of each step; the later line wins."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: [line[name] for name in TRACED] for line in lines if line["kind"] == "train"}


def test_a_run_starts_from_the_one_it_comes_after(history: History) -> None:
    taken = "init_from runs/reproduce/small-quick/seed-0/pairs.mdm/checkpoints/step-00000060: "
    assert taken in (history.runs / "pairs.vmd/train.log").read_text()


def test_what_is_finished_is_not_trained_again(history: History) -> None:
    assert history.started_again == []
    assert history.again["results"] == history.record["results"]


def test_numbers_page_and_figure_are_written_whole(history: History) -> None:
    results, settings = history.record["results"], history.record["settings"]
    runs = {name: history.runs / name for name in ("pairs.mdm", "pairs.vmd")}
    assert results == measure(Runs(history.runs), 0)
    assert (settings["table"], settings["budget"], settings["seeds"]) == ("small", "quick", 1)
    assert settings["runs"]["pairs.vmd"] == {"recipe": VMD.recipe, "overrides": [*VMD.overrides], "after": "pairs.mdm"}
    assert (settings["paper"], settings["notes"]) == (SMALL_TABLE.paper, ["A note."])
    assert history.record["seconds"] > settings["training_seconds"]["pairs.vmd"]
    assert settings["training_commits"]["pairs.mdm"] == settings["training_commits"]["pairs.vmd"] != []
    assert settings["latents"].keys() == {"pairs.vmd"}
    assert settings["latents"]["pairs.vmd"].keys() == {"kl", "active_units", "mutual_information"}
    assert settings["training_seconds"] == {name: round(Runs(history.runs).seconds(name)) for name in runs}

    shown = f"{results['pairs.one_step.mdm.accuracy']:.4g} (0.1018)"
    assert shown in history.printed
    out = history.place / "out"
    page = (out / "small.md").read_text()
    assert f"| pairs.one_step | accuracy | {shown} | {results['pairs.one_step.vmd.accuracy']:.4g} |" in page
    assert "- A note." in page
    assert "![small-accuracy.png](small-accuracy.png)" in page
    with Image.open(out / "small-accuracy.png") as image:
        image.load()
    assert sorted(path.name for path in out.iterdir()) == ["small-accuracy.png", "small.json", "small.md"]


@dataclass
class Machine:
    """Processes that take as long as they should, one look each, and write nothing."""

    looks: dict[str, int]
    exit_codes: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most: int = 0
    threads: set[str] = field(default_factory=set)

    def start(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> "Process":
        """One more."""
        name = next(Path(part).name for part in command if part.startswith("folder="))
        self.log.append(name)
        self.running.add(name)
        self.most = max(self.most, len(self.running))
        self.threads.add(env["OMP_NUM_THREADS"])
        stdout.write("".join(f"line {number} of {name}\n" for number in range(40)))
        return Process(self, name)


@dataclass
class Process:
    """One process of the machine."""

    machine: Machine
    name: str
    returncode: int | None = None

    def poll(self) -> int | None:
        """Whether it has ended."""
        self.machine.looks[self.name] -= 1
        if self.machine.looks[self.name] <= 0:
            self.returncode = self.machine.exit_codes.get(self.name, 0)
            self.machine.running.discard(self.name)
        return self.returncode

    def terminate(self) -> None:
        """Ends it."""
        self.machine.log.append(f"end {self.name}")
        self.machine.running.discard(self.name)

    def wait(self) -> None:
        """It has ended."""
        assert self.name not in self.machine.running


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """A machine in place of this one's processes."""

    def make(cores: int, looks: dict[str, int], **exit_codes: int) -> Machine:
        machine = Machine(looks, exit_codes)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(training, "subprocess", SimpleNamespace(Popen=machine.start, STDOUT=subprocess.STDOUT))
        return machine

    return make


def of_steps(steps: int, after: str | None = None) -> Job:
    """A run of so many steps."""
    return Job(MDM.recipe, (*SMALL, f"train.steps={steps}"), after)


def test_as_many_at_once_as_cores_parents_and_then_long_ones_first(machine_of: Callable[..., Machine]) -> None:
    jobs = {"short": of_steps(1), "parent": of_steps(2), "long": of_steps(9), "child": of_steps(5, "parent")}
    machine = machine_of(2, {"short": 1, "parent": 3, "long": 9, "child": 2})
    train_all(jobs, Path("runs"), 0)
    assert machine.log == ["parent", "long", "child", "short"]
    assert (machine.most, machine.threads) == (2, {"1"})


def test_cores_are_divided_among_few_runs(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(8, {"one": 2, "two": 3})
    train_all({"one": of_steps(1), "two": of_steps(2)}, Path("runs"), 0)
    assert (machine.most, machine.threads) == (2, {"4"})


def test_a_run_that_fails_ends_the_others_and_shows_the_end_of_its_log(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(2, {"bad": 1, "other": 9}, bad=7)
    with pytest.raises(ValueError, match=r"^training runs/bad ended with exit code 7:") as caught:
        train_all({"bad": of_steps(1), "other": of_steps(2), "child": of_steps(3, "bad")}, Path("runs"), 0)
    assert str(caught.value).splitlines()[1:] == [f"line {number} of bad" for number in range(25, 40)]
    assert "end other" in machine.log
    assert "child" not in machine.log


def test_a_run_of_another_version_of_the_table_does_not_pass_for_this_one(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(2, {})
    Path("runs/pairs").mkdir(parents=True)
    old = build(MDM.recipe, [*MDM.overrides, "folder=runs/pairs", "optim.lr=0.5"])
    Path("runs/pairs/config.yaml").write_text(dump_config(old))
    with pytest.raises(ValueError, match=r"^runs/pairs holds a run with other settings \(lr: 0.5\): delete it"):
        train_all({"pairs": MDM}, Path("runs"), 0)
    assert not machine.log


def test_what_can_not_be_written_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, machine_of: Callable[..., Machine]
) -> None:
    machine = machine_of(2, {})
    Path("out").write_text("a file")
    with pytest.raises(ValueError, match="out is not a folder"):
        reproduce_small(monkeypatch)
    Path("out").unlink()
    Path("runs").write_text("a file")
    with pytest.raises(ValueError, match="runs is not a folder"):
        reproduce_small(monkeypatch)
    assert not machine.log


def test_unknown_names_are_refused_with_the_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["penumbra", "reproduce", "vmd-table-9"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("penumbra: 'vmd-table-9' is not a table to reproduce: use one of ")
    listed = {line.split()[0] for line in framework.list_reproductions().splitlines()}
    assert {"vadd-table-1", "vmd-table-1", "vmd-ablations"} <= listed
    assert listed == set(errors.strip().partition("use one of ")[2].split(", "))
    assert not list(Path().iterdir())


def test_several_seeds_give_means_deviations_and_paired_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ours, base = rng.normal(0.9, 0.02, 6), rng.normal(0.88, 0.02, 6)

    def by_seed(_: Runs, seed: int) -> Results:
        return {"d1.b1_nfe1.vmd.accuracy": float(ours[seed]), "d1.b1_nfe1.mdm.accuracy": float(base[seed])}

    no_jobs: Callable[[Budget], dict[str, Job]] = lambda budget: {}  # noqa: E731
    record = reproduce_small(monkeypatch, seeds=6, jobs=no_jobs, measure=by_seed)
    results = record["results"]
    key = "d1.b1_nfe1.vmd.accuracy"
    assert results[key] == pytest.approx(ours.mean())
    assert results[f"{key}_std"] == pytest.approx(ours.std(ddof=1))
    test = stats.permutation_test(
        (ours, base), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert results["d1.b1_nfe1.vmd_minus_mdm.accuracy"] == pytest.approx((ours - base).mean())
    assert results["d1.b1_nfe1.vmd_minus_mdm.accuracy_p"] == pytest.approx(test.pvalue)
    assert 0.0625 < test.pvalue < 0.9, "a value that tells tests apart"
    assert f"{ours.mean():.4g} \u00b1 {ours.std(ddof=1):.2g}" in Path("out/small.md").read_text()


def test_only_the_pairs_asked_for_are_compared_and_one_seed_compares_nothing() -> None:
    seeds = [{f"s.{system}.kl": value + n for system, value in (("a", 1.0), ("b", 3.0), ("c", 7.0))} for n in range(3)]
    found = over_seeds(seeds, [("c", "a"), ("b", "missing")])
    extra = {key for key in found if not key.endswith("_std")} - seeds[0].keys()
    assert extra == {"s.c_minus_a.kl", "s.c_minus_a.kl_p"}
    assert (found["s.c_minus_a.kl"], found["s.c_minus_a.kl_p"]) == (6.0, 0.25)
    assert over_seeds(seeds[:1], [("c", "a")]) == seeds[0]


def test_rows_have_the_papers_number_in_brackets() -> None:
    results = {
        "d1.b1_nfe1.mdm.kl": 9.40123,
        "d1.b1_nfe1.vmd.kl": 0.0987654,
        "d1.b1_nfe1.vmd.kl_std": 0.0123,
        "d2.b1_nfe1.vmd.kl": 0.5,
    }
    paper = {"d1.b1_nfe1.mdm.kl": 9.422, "d1.b1_nfe1.vmd.kl": 0.099, "d9.b1_nfe1.vmd.kl": 1.0}
    header, cells = rows_of(results, paper)
    assert header == ["setting", "metric", "mdm", "vmd"]
    assert cells == [
        ["d1.b1_nfe1", "kl", "9.401 (9.422)", "0.09877 \u00b1 0.012 (0.099)"],
        ["d2.b1_nfe1", "kl", "", "0.5"],
    ]
    lines = as_markdown(results, paper).splitlines()
    assert lines[0] == "| setting | metric | mdm | vmd |"
    assert [line.count("|") for line in lines] == [5] * 4
    assert as_rich("t", results, paper).row_count == 2


def test_keys_are_setting_system_metric() -> None:
    assert split("d1.b1_nfe1.vmd.accuracy") == ("d1.b1_nfe1", "vmd", "accuracy")
    assert split("checkerboard.vadd.js_1") == ("checkerboard", "vadd", "js_1")


def test_training_time_is_that_of_all_processes() -> None:
    Path("runs/mdm").mkdir(parents=True)
    clock = (0.5, 2.0, 5.0, 0.1, 3.0, 0.2, 0.2)
    lines = [{"kind": "train", "seconds": seconds, "processor_seconds": seconds / 4} for seconds in clock]
    Path("runs/mdm/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert Runs(Path("runs")).seconds("mdm") == pytest.approx(5.0 + 3.0 + 0.2)
    assert Runs(Path("runs")).seconds("mdm", "processor_seconds") == pytest.approx((5.0 + 3.0 + 0.2) / 4)


def test_samples_do_not_depend_on_their_batches_and_keep_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MaskedDiffusion(build(VMD.recipe, [*VMD.overrides, "folder=nowhere"]).model)
    initialise(model, 0, num_layers=1)
    whole = draw(model, 10, 2, CATEGORICAL, 2, seed=5)
    given = torch.stack((torch.arange(10), torch.full((10,), 10)), dim=1)
    completed = complete(model, given, given == 10, CATEGORICAL, 1, seed=5)
    assert (completed[:, 0] == np.arange(10)).all()
    assert (completed != 10).all()
    monkeypatch.setattr(samples, "BATCH", 3)
    assert (draw(model, 10, 2, CATEGORICAL, 2, seed=5) == whole).all()
    assert (draw(model, 10, 2, CATEGORICAL, 2, seed=6) != whole).any()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_sigterm_ends_the_runs_too(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launchers.cli", "reproduce", "vmd-table-1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(tmp_path.rglob("config.yaml")):
        assert process.poll() is None
        time.sleep(0.1)
    runs = [int(number) for number in children.read_text().split()]
    process.terminate()
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert runs
    assert not any(map(is_alive, runs))
