"""Measurements are written whole, or not at all."""

import json
from pathlib import Path

import pytest

from eval.record import Record, write_whole


def test_a_record_is_written_wherever_it_is_wanted(tmp_path: Path) -> None:
    record = Record({"a": 1}, command="penumbra bench head")
    record.write({"x.y": 2.0}, tmp_path / "a" / "b.json", None, tmp_path / "c.json")
    for path in (tmp_path / "a" / "b.json", tmp_path / "c.json"):
        found = json.loads(path.read_text())
        assert (found["command"], found["settings"], found["results"]) == (record.command, {"a": 1}, {"x.y": 2.0})


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "x.json"):
        with pytest.raises(ValueError, match=r"can not be written .*: choose another place"):
            write_whole(path, "text")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
