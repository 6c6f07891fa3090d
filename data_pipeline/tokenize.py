"""From a source to a data set: tokenizer, splits, shards, manifest."""

import glob
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import (
    FILE_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    ShardRecord,
    SplitManifest,
    TokenizerRecord,
    sha256_of,
)
from data_pipeline.shards import ShardWriter, bin_path, idx_path
from data_pipeline.sources import Document, read_documents
from data_pipeline.tokenizers import Tokenizer, make_tokenizer

HASH_RANGE = 2**64
BATCH_DOCUMENTS = 128

Progress = Callable[[int, int], None]


def tokenize(
    source: str,
    *,
    tokenizer: str,
    out: Path,
    validation_fraction: float = 0.05,
    seed: int = 0,
    max_shard_tokens: int = 2**28,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Write the documents of a source as a data set, which appears at `out` complete or not at all.

    source: see read_documents. tokenizer: see make_tokenizer. Each document is prompt + text + end token.
    validation_fraction: share of documents, chosen by a hash of (seed, text), for the validation split;
    unless it is 0, both splits get at least one document. max_shard_tokens: a shard is closed before it would
    grow beyond this.
    overwrite: replace the data set that is at `out`. progress: called with documents done and in all.
    Raises ValueError for illegal settings, sources and tokenizers, and where `out` can not be written.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; give a number from 0 (no validation split) to below 1"
        )
    _clear_up(out)
    _check_destination(out, overwrite)
    maker = make_tokenizer(tokenizer, lambda: (item.prompt + item.text for item in read_documents(source)))
    survey = _survey(source, validation_fraction, seed)
    with _appearing(out) as folder:
        maker.save(folder / TOKENIZER_FOLDER)
        splits = {name: _SplitWriter(folder, name, maker, max_shard_tokens) for name in ("train", "validation")}
        for done, (document, digest) in enumerate(_distinct(source, seed), start=1):
            splits["validation" if digest < survey.cut else "train"].add(document)
            progress(done, survey.num_documents)
        manifest = Manifest(
            source=source,
            validation_fraction=validation_fraction,
            seed=seed,
            num_duplicates=survey.num_duplicates,
            num_skipped=survey.num_skipped,
            tokenizer=_record(tokenizer, maker),
            splits={name: split.close() for name, split in splits.items()},
        )
        manifest.save(folder)
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """First pass over a source: documents whose hash is below `cut` are for validation."""

    num_documents: int
    num_duplicates: int
    num_skipped: int
    cut: int


def _survey(source: str, fraction: float, seed: int) -> _Survey:
    skipped: list[str] = []
    digests = [_digest(document, seed) for document in read_documents(source, on_skip=skipped.append)]
    distinct = set(digests)
    cut = 0
    if fraction > 0:
        if len(distinct) < 2:
            raise ValueError(
                f"source {source!r} holds one distinct document, which cannot be split in two; "
                "set validation_fraction to 0, or give more documents"
            )
        cut = min(max(int(fraction * HASH_RANGE), min(distinct) + 1), max(distinct))
    return _Survey(
        num_documents=len(distinct),
        num_duplicates=len(digests) - len(distinct),
        num_skipped=len(skipped),
        cut=cut,
    )


def _digest(document: Document, seed: int) -> int:
    content = f"{seed}\n{document.prompt}{document.text}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def _distinct(source: str, seed: int) -> Iterator[tuple[Document, int]]:
    """The first document of each text, with its hash."""
    seen: set[int] = set()
    for document in read_documents(source):
        digest = _digest(document, seed)
        if digest not in seen:
            seen.add(digest)
            yield document, digest


class _SplitWriter:
    """Encodes the documents of one split in batches and lays them in shards."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, max_shard_tokens: int) -> None:
        self._folder, self._name = folder, name
        self._tokenizer, self._max_shard_tokens = tokenizer, max_shard_tokens
        self._waiting: list[Document] = []
        self._records: list[ShardRecord] = []
        self._writer: ShardWriter | None = None
        self._prompts: list[int] = []

    def add(self, document: Document) -> None:
        self._waiting.append(document)
        if len(self._waiting) == BATCH_DOCUMENTS:
            self._flush()

    def close(self) -> SplitManifest:
        self._flush()
        self._seal()
        return SplitManifest(
            shards=tuple(self._records),
            num_documents=sum(record.num_documents for record in self._records),
            num_tokens=sum(record.num_tokens for record in self._records),
        )

    def _flush(self) -> None:
        """Prompts are encoded apart, so that a prompt's tokens do not depend on what follows it."""
        prompts = self._tokenizer.encode_batch([document.prompt for document in self._waiting])
        texts = self._tokenizer.encode_batch([document.text for document in self._waiting])
        for prompt, text in zip(prompts, texts, strict=True):
            self._write([*prompt, *text, self._tokenizer.end_id], len(prompt))
        self._waiting.clear()

    def _write(self, ids: list[int], prompt_length: int) -> None:
        if self._writer and self._writer.num_tokens + len(ids) > self._max_shard_tokens:
            self._seal()
        if self._writer is None:
            prefix = self._folder / f"{self._name}-{len(self._records):05d}"
            self._writer = ShardWriter(prefix, self._tokenizer.vocab_size)
        self._writer.add(ids)
        self._prompts.append(prompt_length)

    def _seal(self) -> None:
        if self._writer is None:
            return
        info, prefix = self._writer.close(), self._writer.prefix
        files = [bin_path(prefix), idx_path(prefix)]
        if any(self._prompts):
            files.append(prefix.with_name(f"{prefix.name}.prompts.npy"))
            with files[-1].open("wb") as stream:
                np.save(stream, np.array(self._prompts, np.int32))
                stream.flush()
                os.fsync(stream.fileno())
        self._records.append(
            ShardRecord(
                prefix=info.prefix,
                num_documents=info.num_documents,
                num_tokens=info.num_tokens,
                sha256={file.name: sha256_of(file) for file in files},
            )
        )
        self._writer, self._prompts = None, []


def _record(spec: str, tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        spec=spec,
        sha256=tokenizer.sha256(),
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
    )


def _clear_up(out: Path) -> None:
    """Ends what killed processes of this machine began: half-written folders go, data they moved aside comes back."""
    for kind in ("old", "tmp"):
        for left in map(Path, glob.glob(f"{glob.escape(str(out))}.{kind}-{glob.escape(platform.node())}-*")):
            process = left.name.rpartition("-")[2]
            if not process.isdecimal() or _runs_elsewhere(int(process)):
                continue
            if kind == "old" and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _runs_elsewhere(process: int) -> bool:
    """Whether another process has this number; our own may be one that a killed container had too."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _check_destination(out: Path, overwrite: bool) -> None:
    if Path.cwd().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds the working directory, which a data set can not replace; give a new folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / FILE_NAME).is_file():
        raise ValueError(f"{out} exists and is not a tokenised data set; give the path of a new folder")
    if not overwrite:
        raise ValueError(f"{out} already holds a tokenised data set; overwrite it explicitly, or give a new folder")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the body ends well, and vanishes otherwise."""
    process = f"{platform.node()}-{os.getpid()}"
    temporary, old = (out.with_name(f"{out.name}.{kind}-{process}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        _sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(old) and not out.exists():
            old.rename(out)
        if isinstance(error, OSError):
            raise ValueError(
                f"{out} cannot be written ({error.strerror or error}); give a folder that can be, with room for it"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
