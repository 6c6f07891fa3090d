"""Which checkpoints stay: the newest permanent ones, the newest ephemeral one, and marked steps."""

from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import FORMAT, Kind, Manifest, sealed_in
from pretrain.checkpoint.retention import abandon_after, retain
from pretrain.checkpoint.save import checkpoint_name
from pretrain.settings import validate

TREE = {"name": "small", "data": {"kind": "patterns"}, "train": {"batch_tokens": 64}}


def seal(folder: Path, step: int, kind: Kind) -> Path:
    path = folder / checkpoint_name(step)
    path.mkdir(parents=True)
    Manifest(FORMAT, step, {}, {}, 1, kind).write(path)
    return path


def left_of(folder: Path, saves: str, *, keep: int, keep_every: int = 0) -> str:
    """Saves in order, written 10 for a permanent and 12e for an ephemeral one; what is left, written alike."""
    kinds: dict[str, Kind] = {}
    for save in saves.split():
        step = int(save.rstrip("e"))
        kinds[checkpoint_name(step)] = "ephemeral" if save.endswith("e") else "permanent"
        retain(seal(folder, step, kinds[checkpoint_name(step)]), keep=keep, keep_every=keep_every)
    names = sorted(path.name for path in folder.iterdir())
    return " ".join(f"{int(n.removeprefix('step-'))}{'e' if kinds[n] == 'ephemeral' else ''}" for n in names)


@pytest.mark.parametrize(
    ("saves", "keep", "keep_every", "left"),
    [
        ("10 20 30", 2, 0, "20 30"),
        ("10 20 30", 1, 0, "30"),
        ("10e", 1, 0, "10e"),
        ("10 12e", 1, 0, "10 12e"),
        ("10 12e 14e", 1, 0, "10 14e"),
        ("12e 14e", 1, 0, "14e"),
        ("10 12e 14e 20", 2, 0, "10 20"),
        ("10 12e 14e 20", 1, 0, "20"),
        ("10 20 22e 24e", 2, 0, "10 20 24e"),
        ("10 20 30 40 50", 1, 20, "20 40 50"),
        ("10 20 30 40 42e", 1, 20, "20 40 42e"),
        ("10 20 30 40 50 60", 2, 30, "30 50 60"),
    ],
)
def test_what_is_left_after_a_row_of_saves(tmp_path: Path, saves: str, keep: int, keep_every: int, left: str) -> None:
    assert left_of(tmp_path, saves, keep=keep, keep_every=keep_every) == left


def test_later_ones_wait_unless_the_run_goes_another_way(tmp_path: Path) -> None:
    paths = [seal(tmp_path, step, "permanent") for step in (10, 20, 30, 40)]
    retain(paths[1], keep=1, keep_every=0)
    assert sealed_in(tmp_path) == paths[1:]
    abandon_after(paths[2])
    assert sealed_in(tmp_path) == paths[1:3]


def test_one_without_a_readable_seal_counts_as_permanent(tmp_path: Path) -> None:
    for step in (10, 20):
        seal(tmp_path, step, "ephemeral")
    (tmp_path / checkpoint_name(20) / "manifest.json").write_text("{")
    retain(seal(tmp_path, 30, "permanent"), keep=2, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(20), checkpoint_name(30)]


def test_a_seal_of_before_there_were_kinds_is_permanent(tmp_path: Path) -> None:
    seal(tmp_path, 10, "permanent")
    manifest = tmp_path / checkpoint_name(10) / "manifest.json"
    text = manifest.read_text().replace(',\n "kind": "permanent"', "")
    assert "kind" not in text
    manifest.write_text(text)
    retain(seal(tmp_path, 20, "permanent"), keep=2, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(10), checkpoint_name(20)]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("checkpoint.keep_every=30", "checkpoint.every=20"), "checkpoint.keep_every=30 is not a multiple of"),
        (("checkpoint.keep_every=30", "checkpoint.every=0"), "checkpoint.keep_every=30 is not a multiple of"),
        (("checkpoint.export_every=30", "checkpoint.every=20"), "checkpoint.export_every=30 is not a multiple of"),
        (("checkpoint.export_every=-1",), "checkpoint.export_every=-1 must be at least 0"),
        (("checkpoint.keep_every=-1",), "checkpoint.keep_every=-1 must be at least 0"),
        (("checkpoint.keep=0",), "checkpoint.keep=0 must be at least 1"),
        (("checkpoint.every=-1",), "checkpoint.every=-1 must be at least 0"),
        (("checkpoint.ephemeral_minutes=-0.5",), "checkpoint.ephemeral_minutes=-0.5 must be at least 0"),
        (("checkpoint.ephemeral_minutes=.nan",), "checkpoint.ephemeral_minutes=nan must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        validate(TREE, overrides)
    validate(TREE, ["checkpoint.keep_every=40", "checkpoint.every=20", "checkpoint.ephemeral_minutes=2.5"])
