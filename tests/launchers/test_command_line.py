"""The command line: help, and one sentence for every mistake, with nothing half-written left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import click
import pytest
import typer

from data_pipeline.tokenize import tokenize
from launchers.cli import app, main
from launchers.options import sampling_settings
from pretrain.config import RunConfig
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]
Cli = Callable[..., tuple[int, str, str]]


def leaves(group: click.Group, *names: str) -> dict[tuple[str, ...], click.Command]:
    """Every command below a group, by its words."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        words = (*names, name)
        found |= leaves(command, *words) if hasattr(command, "commands") else {words: command}  # type: ignore[arg-type]
    return found


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`penumbra ARGUMENTS` in a folder of its own: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penumbra", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, errors = capsys.readouterr()
        return code, out, errors

    return run


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """The sentence with which a command is refused; nothing in the folder has changed."""

    def run(*arguments: str | Path) -> str:
        before = sorted(map(str, tmp_path.rglob("*")))
        code, _, errors = cli(*arguments)
        assert code == 2, errors
        assert "Traceback" not in errors
        assert errors.startswith("penumbra: ")
        assert len(errors.splitlines()) == 1
        assert sorted(map(str, tmp_path.rglob("*"))) == before
        return errors.removeprefix("penumbra: ").rstrip("\n")

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., RunConfig]) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(make_config(folder, "train.steps=2"))
    return folder


@pytest.mark.parametrize("words", leaves(COMMANDS), ids=" ".join)
def test_help_names_and_explains_every_option(cli: Cli, words: tuple[str, ...]) -> None:
    code, text, errors = cli(*words, "--help")
    assert (code, errors) == (0, "")
    text = " ".join(text.split())
    command = leaves(COMMANDS)[words]
    assert (command.help or "").split("\n")[0] in text
    for parameter in command.params:
        if parameter.opts[0].startswith("-"):
            assert parameter.opts[0] in text
        explanation = getattr(parameter, "help", None)
        assert explanation, f"{parameter.name} has no help"
        assert " ".join(explanation.split())[:25] in text


def test_the_top_help_lists_the_commands(cli: Cli) -> None:
    code, text, _ = cli("--help")
    assert code == 0
    for name in ("recipes", "tokenize", "train", "sample", "eval", "report", "bench"):
        assert name in COMMANDS.commands
        assert f"\n  {name} " in text


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['penumbra', '--help']\n"
        "from launchers.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, stdout=subprocess.DEVNULL)


def test_a_refusal_reaches_the_shell(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for module in (["launchers.cli", "train"], ["pretrain.train"]):
        command = [sys.executable, "-m", *module, "toy_functoins"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("penumbra: 'toy_functoins' is not a recipe: did you mean toy_functions?")
        assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_source_without_text_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no document" in refused("tokenize", "empty", "--out", "data")
    (tmp_path / "empty" / "latin.py").write_bytes(b"# caf\xe9\n")
    assert "holds no document" in refused("tokenize", "empty", "--out", "data")
    assert "does not exist" in refused("tokenize", "nowhere", "--out", "data")
    assert "holds the working directory" in refused("tokenize", "empty", "--out", ".")
    (tmp_path / "x.bin").write_bytes(b"\0")
    assert "cannot be read as text" in refused("tokenize", "x.bin", "--out", "data")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert "x.jsonl:2 has neither" in refused("tokenize", "x.jsonl", "--out", "data")
    (tmp_path / "y.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    assert "y.jsonl.gz cannot be read" in refused("tokenize", "y.jsonl.gz", "--out", "data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_source_that_may_not_be_read_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("x = 1")
    (tmp_path / "secret.py").chmod(0)
    assert "secret.py cannot be read" in refused("tokenize", "secret.py", "--out", "data")


def test_a_tokenizer_that_is_none_is_refused(refused: Callable[..., str], tmp_path: Path, documents: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for spec in ("bite", "bpe:10", "bpe:many", "broken.json"):
        assert "legal: bytes, characters, bpe:N" in refused("tokenize", documents, "--out", "d", "--tokenizer", spec)


def test_data_that_is_there_is_kept(refused: Callable[..., str], tmp_path: Path, documents: Path, shards: Path) -> None:
    shutil.copytree(shards, tmp_path / "data")
    assert "already holds a tokenised data set" in refused("tokenize", documents, "--out", "data")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert "is not a tokenised data set" in refused("tokenize", documents, "--out", "home")


def cut(folder: Path) -> None:
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-3])


def foreign(folder: Path) -> None:
    (folder / "train-00000.idx").write_bytes(b"TNTIDX\0\0" + bytes(64))


def lost(folder: Path) -> None:
    (folder / "train-00000.idx").unlink()


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["extra"] = 300
    path.write_text(json.dumps(fields))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (cut, "train-00000.bin is not a whole token shard: expected"),
        (foreign, "train-00000.idx is not a whole token shard: expected a header"),
        (lost, "train-00000.idx is not a whole token shard: expected a file that can be read"),
        (other_tokenizer, "the manifest says 259"),
        (no_manifest, "holds no tokenised data"),
    ],
)
def test_damaged_data_is_refused(
    refused: Callable[..., str],
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
    shards: Path,
    harm: Callable[[Path], None],
    sentence: str,
) -> None:
    shutil.copytree(shards, tmp_path / "data")
    harm(tmp_path / "data")
    path = write_config(make_config(Path("run"), "data.path=data"), tmp_path / "run.yaml")
    text = refused("train", path)
    assert sentence in text
    assert "again" in text or "run `penumbra tokenize" in text


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.batch_tokens=100"], "train.batch_tokens=100 is not a positive multiple of data.length=32"),
        (["train.micro_batch_tokens=33"], "train.micro_batch_tokens=33 is not a positive multiple of data.length=32"),
        (["optim.rl=1"], "optim.rl is not a setting: did you mean optim.lr?"),
        (["optim.lr"], "write dotted.key=value"),
        (["data.path=nowhere"], "nowhere holds no tokenised data"),
        (["model.vocab_size=100", "model.mask_id=99"], "the tokenizer has 259 tokens"),
        (["data.length=100000", "train.batch_tokens=100000"], "set a row length of at most"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    refused: Callable[..., str],
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
    overrides: list[str],
    sentence: str,
) -> None:
    path = write_config(make_config(Path("run")), tmp_path / "run.yaml")
    assert sentence in refused("train", path, *overrides)


def test_many_mistakes_are_listed_at_once(cli: Cli) -> None:
    code, _, errors = cli("train", "demo", "train.batch_tokens=100", "log.every=0", "--dry-run")
    assert code == 2
    assert len(errors.splitlines()) == 3
    assert "train.batch_tokens=100" in errors
    assert "log.every=0" in errors


def test_unknown_recipes_and_files_are_refused(refused: Callable[..., str]) -> None:
    assert refused("train", "dmeo").startswith("'dmeo' is not a recipe: did you mean demo?")
    assert refused("recipes", "dit_smal").startswith("'dit_smal' is not a recipe: did you mean dit_small?")
    assert "can not be read" in refused("train", "runs/none/config.yaml")


def test_a_checkpoint_of_another_model_is_refused(refused: Callable[..., str], tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    kept = (tmp_path / "run" / "config.yaml").read_text()
    text = refused("train", "run/config.yaml", "folder=run", "model.backbone.dim=64", "train.steps=4")
    assert "is a checkpoint of another model (model.backbone.dim is 32 there and 64 here)" in text
    assert (tmp_path / "run" / "config.yaml").read_text() == kept


def test_a_folder_that_can_not_be_made_is_refused(
    refused: Callable[..., str],
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
) -> None:
    (tmp_path / "file").write_text("")
    path = write_config(make_config(Path("file/run")), tmp_path / "run.yaml")
    assert "can not be made" in refused("train", path)


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_what_is_no_run_is_refused(refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    assert "is not a run folder" in refused(command, "nowhere")
    (tmp_path / "run").mkdir()
    assert "is not a run folder" in refused(command, "run")


def test_a_run_without_a_good_checkpoint_is_refused(cli: Cli, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/model.json")
    file.write_text("{}")
    code, _, errors = cli("sample", "run")
    assert code == 2
    assert "passing over checkpoint step-00000002" in errors
    assert "run is not a run folder with a usable checkpoint: train it first" in errors
    assert "Traceback" not in errors


def test_one_checkpoint_of_a_run_serves_as_the_run(cli: Cli, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    code, out, errors = cli("eval", "run/checkpoints/step-00000002", "--limit", "4", "--json", "bound.json")
    assert (code, errors) == (0, "")
    assert "written to run/evaluations/bound.json" in out
    code, _, errors = cli("sample", "run/checkpoints/step-00000002", "--steps", "4")
    assert (code, errors) == (0, "")
    assert (tmp_path / "run" / "samples" / "sample.json").is_file()


def test_data_made_anew_with_another_tokenizer_is_not_measured(
    refused: Callable[..., str], tmp_path: Path, documents: Path, make_config: Callable[..., RunConfig]
) -> None:
    tokenize(str(documents), tokenizer="bytes", out=tmp_path / "data", validation_fraction=0.2)
    train(make_config(tmp_path / "run", "train.steps=1", f"data.path={tmp_path / 'data'}"))
    arguments = {"tokenizer": "bpe:259", "validation_fraction": 0.2, "overwrite": True}
    tokenize(str(documents), out=tmp_path / "data", **arguments)  # type: ignore[arg-type]
    assert "have changed since it was trained" in refused("eval", "run")


def test_samples_and_evaluations_that_do_not_fit_are_refused(
    refused: Callable[..., str], tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert "leaves no room on a canvas" in refused("sample", "run", "--prompt", "x" * 50)
    assert "'humanevil' is not a task: use bound" in refused("eval", "run", "--task", "humanevil")
    assert "was not trained on toy functions" in refused("eval", "run", "--task", "toy_functions")
    assert "top_p=0.0 must" in refused("sample", "run", "--top-p", "0")
    assert "would be the same at temperature 0: set --temperature" in refused(
        "eval", "run", "--task", "demo_tasks", "--num-samples", "2"
    )
    (tmp_path / "tasks.jsonl").write_text("{}\n")
    assert "tasks.jsonl:1: key 'task_id' is missing" in refused("eval", "run", "--task", "tasks.jsonl")


def test_places_that_can_not_be_written_are_refused_before_the_work(
    refused: Callable[..., str], tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("launchers.evaluating.run_task", lambda *arguments: pytest.fail("it worked first"))
    assert "folder can not be written (it is a folder)" in refused("eval", "run", "--json", "folder")
    assert "file is not a folder" in refused("eval", "run", "--json", "file/scores.json")
    assert "can not be written" in refused("report", "run", "--out", "file/r.html")
    (tmp_path / "run" / "samples").touch()
    assert "samples is not a folder" in refused("sample", "run")


def test_a_report_of_nothing_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere" in refused("report", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty is not a run folder" in refused("report", "empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["train"],
        ["tokenize", "x"],
        ["sample", "run", "--steps", "0"],
        ["sample", "run", "--length", "0"],
        ["eval", "run", "--length", "-1"],
        ["eval", "run", "--batch-size", "0"],
        ["sample", "run", "--order", "alphabetical"],
        ["sample", "run", "--hints", "0"],
        ["eval", "run", "--latent", "forgotten"],
        ["eval", "run", "--frobnicate"],
        ["bench", "everything"],
    ],
)
def test_what_does_not_parse_is_refused(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    code, _, errors = cli(*arguments)
    assert code == 2
    assert errors.startswith("Usage: ")
    assert "\nError: " in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_from_text_to_a_measured_run(
    cli: Cli,
    tmp_path: Path,
    documents: Path,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
) -> None:
    code, out, errors = cli("tokenize", documents, "--tokenizer", "bpe:300", "--out", "data")
    assert (code, errors) == (0, "")
    assert "tokenizer bpe:300 with" in out
    path = write_config(make_config(Path("run"), "data.path=data", "train.steps=2"), tmp_path / "small.yaml")
    assert cli("train", path)[0] == 0
    code, out, _ = cli("sample", "run", "--prompt", "def f", "--num", "2", "--length", "24", "--steps", "4", "--trace")
    assert code == 0
    few = ("sample", "run", "--prompt", "def f", "--num", "2", "--length", "24", "--steps", "4", "--trace")
    assert cli(*few, "--batch-size", "1") == (0, out, "")
    assert cli(*few, "--amount", "cosine")[0] == 0
    cosine = json.loads((tmp_path / "run" / "samples" / "sample.json").read_text())
    assert (cosine["settings"]["amount"], cosine["settings"]["order"]) == ("cosine", "top_probability")
    assert cli(*few, "--amount", "ancestral")[0] == 0
    ancestral = json.loads((tmp_path / "run" / "samples" / "sample.json").read_text())
    assert ancestral["settings"]["order"] == "random"
    assert "sample 2 of 2" in out
    kept = json.loads((tmp_path / "run" / "samples" / "sample.json").read_text())
    assert [s["prompt"] for s in kept["samples"]] == ["def f"] * 2
    code, out, _ = cli("eval", "run", "--task", "bound", "--json", "scores.json")
    assert code == 0
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record.keys() >= {"command", "commit", "versions", "machine", "settings", "seconds", "results"}
    assert record["command"] == "penumbra eval run --task bound --json scores.json"
    assert 0 < record["results"]["bound.nelbo"] < 10
    assert json.loads((tmp_path / "run" / "evaluations" / "bound.json").read_text())["results"] == record["results"]
    assert cli("report", "run")[0] == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    leftovers = [p for p in tmp_path.rglob("*") if ".tmp" in p.name]
    assert not leftovers


def test_sampling_is_declared_once_for_every_command_that_samples() -> None:
    shared = signature(sampling_settings).parameters
    assert {"steps", "order", "latent", "hints", "hint_estimate"} <= shared.keys()
    found = {}
    for name in ("sample", "eval"):
        options = {parameter.name: parameter for parameter in COMMANDS.commands[name].params}
        found[name] = {n: (options[n].opts, getattr(options[n], "help", None), options[n].default) for n in shared}
    differing = [n for n in shared if found["sample"][n] != found["eval"][n]]
    assert differing == ["temperature"]
    assert (found["sample"]["temperature"][-1], found["eval"]["temperature"][-1]) == (1.0, 0.0)


LATENT = ("model.block_size=8", "model.latent.dim=4", "model.latent.inject=embedding")


@pytest.mark.parametrize(
    ("overrides", "options", "settings"),
    [
        ((), ("--order", "left_to_right", "--steps", "5"), {"order": "left_to_right", "steps": 5, "latent": "kept"}),
        (("model.autoregressive=true",), (), {"order": "left_to_right", "steps": None}),
        (LATENT, ("--latent", "refreshed"), {"latent": "refreshed", "steps": 64, "order": "top_probability"}),
        (
            ("model.augmentation={}",),
            ("--hints", "2", "--hint-estimate", "soft", "--amount", "ancestral"),
            {"hints": 2, "hint_estimate": "soft", "order": "random"},
        ),
    ],
)
def test_every_switch_is_sampled_and_scored(
    cli: Cli,
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    overrides: tuple[str, ...],
    options: tuple[str, ...],
    settings: dict[str, object],
) -> None:
    train(make_config(tmp_path / "run", "train.steps=1", "validation.every=0", *overrides))
    code, _, errors = cli("sample", "run", "--prompt", "def f", "--length", "30", *options)
    assert (code, errors) == (0, "")
    sampled = json.loads((tmp_path / "run" / "samples" / "sample.json").read_text())
    assert sampled["settings"].items() >= {**settings, "temperature": 1.0}.items()
    code, _, errors = cli("eval", "run", "--task", "demo_tasks", "--limit", "1", "--length", "400", *options)
    assert (code, errors) == (0, "")
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "run" / "evaluations").iterdir()]
    assert record["settings"]["sampling"].items() >= {**settings, "temperature": 0.0}.items()


def test_samples_of_a_model_with_a_latent_differ_at_temperature_zero(
    cli: Cli, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    train(make_config(tmp_path / "run", "train.steps=1", "validation.every=0", *LATENT))
    few = ("--num-samples", "2", "--limit", "1", "--length", "400", "--steps", "1")
    assert cli("eval", "run", "--task", "demo_tasks", *few)[0] == 0


def test_switches_that_a_run_has_not_are_not_sampled(
    refused: Callable[..., str], tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert "num_hints=2 needs a model with augmentation: use 1" in refused("sample", "run", "--hints", "2")
    assert "latent=redrawn needs a model with a latent" in refused("sample", "run", "--latent", "redrawn")


def test_without_held_out_text_a_bound_is_refused(
    cli: Cli,
    tmp_path: Path,
    documents: Path,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
) -> None:
    tokenize(str(documents), tokenizer="bytes", out=tmp_path / "all", validation_fraction=0)
    path = write_config(make_config(Path("run"), "data.path=all", "train.steps=1"), tmp_path / "small.yaml")
    code, _, errors = cli("train", path)
    assert code == 0, errors
    code, _, errors = cli("eval", "run", "--task", "bound")
    assert code == 2
    assert "held-out" in errors
    assert "Traceback" not in errors


def test_a_dry_run_prints_the_resolved_run(cli: Cli, tmp_path: Path) -> None:
    code, text, _ = cli("train", "demo", "optim.lr=1e-3", "--dry-run")
    assert code == 0
    (tmp_path / "resolved.yaml").write_text(text)
    assert cli("train", "resolved.yaml", "--dry-run")[1] == text
    assert "lr: 0.001" in text
