"""Where documents come from: folders, text files, JSON lines and the interpreter's own standard library."""

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".py", ".txt", *JSONL_SUFFIXES)
LEGAL_SOURCES = f"a folder, a file ending in {', '.join(SUFFIXES)}, or the word stdlib"
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

OnSkip = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text to learn from: the model trains on prompt + text, and the prompt is never masked."""

    name: str
    text: str
    prompt: str = ""


def read_documents(source: str, *, on_skip: OnSkip = lambda name: None) -> Iterator[Document]:
    """The documents of a source, in an order that depends on nothing but their names.

    source: a folder (every .py, .txt, .jsonl, .jsonl.gz and .jsonl.zst below it), one such file, or the word
    `stdlib` (a folder of that name is `./stdlib`). A .py or .txt file is one document. A line of a .jsonl
    file is one document: an object with "text", or with "prompt" and "completion". Documents without text
    are left out.
    on_skip: called with the name of each document that is left out because it is not UTF-8.
    Raises ValueError for a source that does not exist, cannot be read or holds no document; the last two are
    known only while reading.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _some(source, _read_folder(root, (".py",), SKIPPED_FOLDERS | TEST_FOLDERS, on_skip))
    path = Path(source)
    if path.is_dir():
        return _some(source, _read_folder(path, SUFFIXES, SKIPPED_FOLDERS, on_skip))
    if path.is_file() and path.name.endswith(SUFFIXES):
        return _some(source, _read_file(path, path.name, on_skip))
    problem = "cannot be read as text" if path.exists() else "does not exist"
    raise ValueError(f"source {source!r} {problem}; give {LEGAL_SOURCES}")


def _some(source: str, documents: Iterator[Document]) -> Iterator[Document]:
    empty = True
    for document in documents:
        if document.prompt or document.text:
            empty = False
            yield document
    if empty:
        raise ValueError(
            f"source {source!r} holds no document; give {LEGAL_SOURCES} (of a folder, files with these endings are "
            "read; documents that are empty, or not UTF-8, are left out)"
        )


def _read_folder(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str], on_skip: OnSkip) -> Iterator[Document]:
    for path in sorted(_files(root, suffixes, skipped), key=lambda path: path.relative_to(root).parts):
        yield from _read_file(path, path.relative_to(root).as_posix(), on_skip)


def _files(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error)

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffixes) and not name.startswith(".") and path.is_file():
                yield path


def _read_file(path: Path, name: str, on_skip: OnSkip) -> Iterator[Document]:
    if name.endswith(JSONL_SUFFIXES):
        yield from _read_jsonl(path, name, on_skip)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        on_skip(name)
        return
    except OSError as error:
        raise _unreadable(path, error) from error
    yield Document(name=name, text=text)


def _read_jsonl(path: Path, name: str, on_skip: OnSkip) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        document = _parse(line, f"{name}:{number}", f"{path}:{number}")
        if _is_utf8(document.prompt + document.text):
            yield document
        else:
            on_skip(document.name)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a plain or compressed file; every way it can be damaged ends in one ValueError."""
    import zstandard

    try:
        with _open_text(path) as stream:
            yield from stream
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(path, error) from error


def _open_text(path: Path) -> AbstractContextManager[TextIO]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    if path.suffix == ".zst":
        import zstandard

        stream: TextIO = zstandard.open(path, "rt", encoding="utf-8-sig", newline="\n")
        return stream
    return path.open(encoding="utf-8-sig", newline="\n")


def _parse(line: str, name: str, place: str) -> Document:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place} is not JSON ({error.msg}); each line must be one object with text, or with prompt and completion"
        ) from error
    fields = record if isinstance(record, dict) else {}
    if isinstance(fields.get("text"), str):
        return Document(name=name, text=fields["text"])
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        return Document(name=name, text=fields["completion"], prompt=fields["prompt"])
    raise ValueError(
        f'{place} has neither "text" nor "prompt" and "completion" as strings; give each line one of the two forms'
    )


def _is_utf8(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({error}); repair it, or take it out of the source")
