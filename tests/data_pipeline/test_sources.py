import gzip
import json
import sysconfig
from pathlib import Path

import pytest
import zstandard

from data_pipeline.sources import Document, read_documents


def names(source: Path | str) -> list[str]:
    return [document.name for document in read_documents(str(source))]


def test_a_folder_is_read_in_the_order_of_names_without_what_is_not_text(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/z.txt",
        "a/b.py",
        ".git/x.py",
        "__pycache__/x.py",
        "lib/site-packages/x.py",
        "c.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    skipped: list[str] = []
    found = [document.name for document in read_documents(str(tmp_path), on_skip=skipped.append)]
    assert found == ["a/b.py", "a/z.txt", "b.py"]
    assert skipped == ["latin.txt"]


def test_line_ends_survive(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\x0cthree")
    assert [item.text for item in read_documents(str(tmp_path / "a.txt"))] == ["one\r\ntwo\n\x0cthree"]


RECORDS = [{"text": "plain\u2028line"}, {"prompt": "def f():\n", "completion": "    pass\n"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    content = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode()
    packed = {".jsonl": lambda raw: raw, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
    path = tmp_path / f"x{suffix}"
    path.write_bytes(packed[suffix](content))
    expected = [
        Document(name=f"x{suffix}:1", text="plain\u2028line"),
        Document(name=f"x{suffix}:3", text="    pass\n", prompt="def f():\n"),
    ]
    assert list(read_documents(str(path))) == expected
    assert list(read_documents(str(tmp_path))) == expected


def test_text_that_utf8_cannot_spell_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n')
    skipped: list[str] = []
    found = read_documents(str(tmp_path / "x.jsonl"), on_skip=skipped.append)
    assert [document.text for document in found] == ["fine"]
    assert skipped == ["x.jsonl:1"]


def test_the_standard_library_is_there_without_its_tests() -> None:
    found = names("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    assert {"argparse.py", "json/decoder.py"} <= set(found)
    assert all((root / name).is_file() for name in found)
    assert not [name for name in found if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]


@pytest.mark.parametrize("line", ['{"prompt": "x"}', "[1]", '{"text": 3}', "not json"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2"):
        names(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_a_damaged_file_of_lines_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "x"}')[:-12] if name.endswith("gz") else b"\xff\xfe")
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        names(tmp_path)


def test_sources_without_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.md").write_text("text")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="does not exist"):
        read_documents(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_documents(str(tmp_path / "data.md"))
    for source in (tmp_path, tmp_path / "empty.py"):
        with pytest.raises(ValueError, match="holds no document"):
            names(source)
