"""What the README says can be typed."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from launchers.cli import app
from pretrain.recipes import build, recipes
from pretrain.settings import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]


def typed() -> list[str]:
    """The lines of the shell blocks, without comments."""
    blocks = re.findall(r"^[ ]*```(?:sh|bash|console)\n(.*?)^[ ]*```", README, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def lines_of(program: str) -> list[list[str]]:
    found = [words_of(line) for line in typed()]
    return [words for words in found if Path(words[0]).name == program]


def inline(program: str) -> list[list[str]]:
    """Commands quoted within sentences."""
    quoted = re.findall(rf"(?<!`)`({program} [^`\n]+)`(?!`)", README)
    return [shlex.split(text) for text in quoted]


def resolve(recipe: str, overrides: list[str]) -> None:
    """A recipe with its overrides, or the configuration that a recipe's run leaves behind."""
    folder = Path(recipe)
    if folder.suffix == ".yaml":
        assert folder.parts[:1] == ("runs",)
        assert folder.parts[1] in recipes()
        return
    if recipe != "demo_deep":  # the recipe that the README teaches to write
        build(recipe, overrides)


def check(words: list[str]) -> None:
    """Parses one `penumbra` line without running it."""
    command: click.Command = COMMANDS
    rest = words[1:]
    while hasattr(command, "commands"):
        assert rest, f"{words} names no subcommand"
        assert rest[0] in command.commands, f"penumbra has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if not rest:
        return
    context = command.make_context(words[1], list(rest))
    assert not context.args
    if words[1] == "train":
        resolve(context.params["recipe"], list(context.params["overrides"] or []))
    if words[1] == "recipes" and context.params["name"]:
        assert context.params["name"] in recipes()


def test_there_is_something_to_type() -> None:
    assert len(lines_of("penumbra")) >= 5
    assert len(lines_of("make")) >= 1


@pytest.mark.parametrize("words", lines_of("penumbra") + inline("penumbra"), ids=" ".join)
def test_every_command_parses(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("words", lines_of("torchrun"), ids=" ".join)
def test_torchrun_lines_resolve(words: list[str]) -> None:
    start = words.index("-m")
    assert words[start + 1] == "pretrain.train"
    resolve(words[start + 2], words[start + 3 :])


@pytest.mark.parametrize("words", lines_of("make") + inline("make"), ids=" ".join)
def test_every_make_target_exists(words: list[str]) -> None:
    for target in words[1:]:
        assert "=" in target or re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target


def test_only_known_programs_are_named() -> None:
    known = {"make", "penumbra", "torchrun", "git", "cd", ".", "source", "python"}
    assert {Path(words_of(line)[0]).name for line in typed()} <= known


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    assert targets
    for target in targets:
        if not re.match(r"[a-z]+://", target):
            assert (ROOT / target).exists(), target


def test_every_named_source_file_exists() -> None:
    rooms = "model|data_pipeline|pretrain|eval|tools|launchers|tests|docs"
    for path in re.findall(rf"`((?:{rooms})/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_recipe_that_is_taught_works(tmp_path: Path) -> None:
    from pretrain.config import RunConfig
    from pretrain.settings import dump_config

    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    source = block.replace("from ..config", "from pretrain.config").replace("from .", "from pretrain.recipes.")
    space: dict[str, object] = {"__name__": "readme"}
    exec(compile(source, "README", "exec"), space)
    written = [f for f in space.values() if callable(f) and getattr(f, "__module__", "") == "readme"]
    made = [f() for f in written if getattr(f, "__annotations__", {}).get("return") is RunConfig]
    assert made
    for config in made:
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.yaml") == config
