"""The manifest of a tokenised data set: what the folder must hold, and what its numbers mean.

A data set is a folder with manifest.json, tokenizer/, and per shard NAME.bin, NAME.idx and, where documents
have prompts, NAME.prompts.npy (int32: tokens of the prompt of each document).
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards import Shard
from data_pipeline.tokenizers import Tokenizer

VERSION = 1
FILE_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
MAKE_ONE = "run `penumbra tokenize SOURCE --tokenizer T --out DIR`"


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer the ids belong to; spec is what the user asked for."""

    spec: str
    sha256: str
    vocab_size: int
    mask_id: int
    pad_id: int
    end_id: int


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard: its name in the folder, its sizes, and the sha256 of each of its files by file name."""

    prefix: str
    num_documents: int
    num_tokens: int
    sha256: dict[str, str]

    @property
    def prompts_name(self) -> str:
        """Name of the file of prompt lengths, which exists where `sha256` lists it."""
        return f"{self.prefix}.prompts.npy"


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """The shards of one split, in the order of its token stream."""

    shards: tuple[ShardRecord, ...]
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a data set but the tokens.

    num_duplicates: documents dropped because the same text came before. num_skipped: documents that are not
    UTF-8.
    splits: "train" and "validation" (which is empty when validation_fraction is 0).
    """

    source: str
    validation_fraction: float
    seed: int
    num_duplicates: int
    num_skipped: int
    tokenizer: TokenizerRecord
    splits: dict[str, SplitManifest]
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write folder/manifest.json, whole or not at all."""
        temporary = folder / f"{FILE_NAME}.tmp-{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(dataclasses.asdict(self), stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read folder/manifest.json; ValueError when it is missing, damaged or of another version."""
        path = folder / FILE_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{folder} holds no tokenised data ({path}: {error.strerror}); {MAKE_ONE}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); {MAKE_ONE} again") from error
        version = fields.get("version") if isinstance(fields, dict) else None
        if version != VERSION:
            raise ValueError(f"{path} has version {version!r}, this code reads version {VERSION}; {MAKE_ONE} again")
        try:
            return _from_fields(fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} lacks a field or has a foreign one ({error}); {MAKE_ONE} again") from error


def verify(folder: Path) -> None:
    """Recompute every hash of a data set; ValueError naming each file that is missing or differs."""
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    recorded = {name: digest for shard in shards for name, digest in shard.sha256.items()}
    damaged = [name for name, digest in recorded.items() if _digest_or_none(folder / name) != digest]
    if damaged:
        raise ValueError(
            f"{folder} holds {len(damaged)} files that differ from its manifest ({', '.join(damaged)}); "
            f"restore them, or {MAKE_ONE} again"
        )
    open_tokenizer(folder)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a data set; ValueError when it is not the one that the tokens were made with."""
    expected = Manifest.load(folder).tokenizer
    tokenizer = Tokenizer.load(folder / TOKENIZER_FOLDER)
    if tokenizer.vocab_size != expected.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder / TOKENIZER_FOLDER} has {tokenizer.vocab_size} tokens, "
            f"the manifest says {expected.vocab_size}; restore the tokenizer, or {MAKE_ONE} again"
        )
    if tokenizer.sha256() != expected.sha256:
        raise ValueError(
            f"the tokenizer in {folder / TOKENIZER_FOLDER} did not make these tokens "
            f"(its sha256 is not the manifest's {expected.sha256[:12]}); "
            f"restore the tokenizer, or {MAKE_ONE} again"
        )
    return tokenizer


def open_shards(folder: Path, split: str) -> list[Shard]:
    """The shards of a split, their sizes compared with the manifest; ValueError when they differ."""
    return [_open_shard(folder, record) for record in _split(folder, split).shards]


def open_prompts(folder: Path, split: str) -> npt.NDArray[np.int32]:
    """Tokens of the prompt of each document of a split, zero where it has none, int32 [D]."""
    return np.concatenate([_open_prompts(folder, record) for record in _split(folder, split).shards])


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _split(folder: Path, split: str) -> SplitManifest:
    splits = Manifest.load(folder).splits
    filled = [name for name, content in splits.items() if content.num_documents]
    if split not in filled:
        raise ValueError(
            f"{folder} has no documents in split {split!r}, only in: {', '.join(filled)}; take one of those, "
            "or tokenise again with another validation_fraction"
        )
    return splits[split]


def _open_shard(folder: Path, record: ShardRecord) -> Shard:
    shard = Shard(folder / record.prefix)
    if (shard.num_documents, shard.num_tokens) != (record.num_documents, record.num_tokens):
        raise ValueError(
            f"{folder / record.prefix} holds {shard.num_documents} documents, {shard.num_tokens} tokens; "
            f"the manifest says {record.num_documents} and {record.num_tokens}; "
            f"restore the shard, or {MAKE_ONE} again"
        )
    return shard


def _open_prompts(folder: Path, record: ShardRecord) -> npt.NDArray[np.int32]:
    if record.prompts_name not in record.sha256:
        return np.zeros(record.num_documents, np.int32)
    path = folder / record.prompts_name
    try:
        lengths: npt.NDArray[np.int32] = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or {MAKE_ONE} again") from error
    if lengths.shape != (record.num_documents,):
        raise ValueError(
            f"{path} has shape {lengths.shape}, expected one number a document ({record.num_documents},); "
            f"restore it, or {MAKE_ONE} again"
        )
    return lengths


def _digest_or_none(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None


def _from_fields(fields: dict[str, Any]) -> Manifest:
    def split(content: dict[str, Any]) -> SplitManifest:
        shards = tuple(ShardRecord(**record) for record in content["shards"])
        return SplitManifest(**(content | {"shards": shards}))

    splits = {name: split(content) for name, content in fields["splits"].items()}
    return Manifest(**(fields | {"tokenizer": TokenizerRecord(**fields["tokenizer"]), "splits": splits}))
