"""Token shards on disk: Megatron's IndexedDataset, a `.bin` of token ids and an `.idx` of documents.

The `.idx` holds, little-endian: magic (9 bytes), version (u64), dtype code (u8), number of sequences S (u64),
number of document marks D (u64), sequence lengths (i32 x S), byte offsets of sequences (i64 x S), and the
sequences at which documents start and end (i64 x D, first 0, last S). Layout:
megatron.core.datasets.indexed_dataset.
"""

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
UINT16, INT32 = 8, 4
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    INT32: np.int32,
    5: np.int64,
    UINT16: np.uint16,
}
UINT16_LIMIT = 65500  # Megatron's DType.optimal_dtype

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a finished shard holds."""

    prefix: str
    num_documents: int
    num_tokens: int


def bin_path(prefix: Path) -> Path:
    """The file of token ids."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of document boundaries."""
    return prefix.with_name(prefix.name + ".idx")


class ShardWriter:
    """Writes one shard, document by document; the two files appear when it is closed, or never.

    As a context manager it closes on success and leaves nothing behind on an exception.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.lengths: list[int] = []
        self.num_tokens = 0
        self._code = UINT16 if vocab_size < UINT16_LIMIT else INT32
        self._temporary = prefix.with_name(f"{prefix.name}.bin.tmp-{os.getpid()}")
        self._stream: BinaryIO = self._temporary.open("wb")

    def add(self, ids: Sequence[int]) -> None:
        """Append one document of token ids, each in 0..vocab_size-1."""
        array = np.asarray(ids, dtype=np.int64)
        assert array.size, "a document has at least its end token"
        assert array.min() >= 0, "token ids count from 0"
        assert array.max() < self.vocab_size, "token ids stay below the size of the vocabulary"
        self._stream.write(array.astype(np.dtype(DTYPES[self._code]).newbyteorder("<")).tobytes())
        self.lengths.append(array.size)
        self.num_tokens += array.size

    def close(self) -> ShardInfo:
        """Seal the shard: both files are complete and on disk when this returns."""
        assert self.lengths, f"shard {self.prefix} has no documents"
        _sync_and_close(self._stream)
        temporary_idx = self._temporary.with_name(f"{self.prefix.name}.idx.tmp-{os.getpid()}")
        with temporary_idx.open("wb") as stream:
            stream.write(self._index())
            _sync_and_close(stream)
        os.replace(self._temporary, bin_path(self.prefix))
        os.replace(temporary_idx, idx_path(self.prefix))
        return ShardInfo(prefix=self.prefix.name, num_documents=len(self.lengths), num_tokens=self.num_tokens)

    def _index(self) -> bytes:
        count = len(self.lengths)
        lengths = np.array(self.lengths, dtype="<i8")
        pointers = (np.cumsum(lengths) - lengths) * np.dtype(DTYPES[self._code]).itemsize
        header = HEADER.pack(MAGIC, VERSION, self._code, count, count + 1)
        documents = np.arange(count + 1, dtype="<i8")
        return b"".join([header, lengths.astype("<i4").tobytes(), pointers.tobytes(), documents.tobytes()])

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)
        elif not self._stream.closed:
            self.close()


class Shard:
    """A memory-mapped shard, ours or Megatron's: documents laid end to end in one stream of tokens.

    prefix: the path without .bin and .idx.
    num_documents, num_tokens: sizes. lengths: tokens of each document, int64 [D]. offsets: where each
    document starts in the stream, then the end, int64 [D + 1].
    Raises ValueError naming the file when one is missing, truncated or of another format.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        code, sequence_lengths, pointers, marks = _read_index(idx_path(prefix))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sequence_lengths, dtype=np.int64)])
        itemsize = np.dtype(DTYPES[code]).itemsize
        if not np.array_equal(starts[:-1] * itemsize, pointers):
            _refuse(idx_path(prefix), "byte offsets that continue each other", "others")
        self.num_tokens = int(starts[-1])
        self._tokens = _map_tokens(bin_path(prefix), code, self.num_tokens)
        self.offsets: Int64Array = starts[marks]
        self.lengths: Int64Array = np.diff(self.offsets)
        self.num_documents = len(self.lengths)

    def __reduce__(self) -> tuple[Callable[[Path], "Shard"], tuple[Path]]:
        return Shard, (self.prefix,)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Tokens start..stop-1 of the stream, in the shard's own dtype, without a copy."""
        return self._tokens[start:stop]


def _read_index(path: Path) -> tuple[int, npt.NDArray[np.int32], Int64Array, Int64Array]:
    """dtype code, sequence lengths, byte offsets and document marks, checked against the size of the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        _refuse(path, "a file that can be read", error.strerror or str(error), error)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        _refuse(path, f"a header of {HEADER.size} bytes that starts with {MAGIC!r}", repr(raw[: len(MAGIC)]))
    _, version, code, num_sequences, num_marks = HEADER.unpack_from(raw)
    if version != VERSION:
        _refuse(path, f"version {VERSION}", str(version))
    if code not in DTYPES:
        _refuse(path, f"a dtype code of integers ({', '.join(map(str, DTYPES))})", str(code))
    expected = HEADER.size + 12 * num_sequences + 8 * num_marks
    if len(raw) != expected:
        _refuse(path, f"{expected} bytes", f"{len(raw)}")
    lengths = np.frombuffer(raw, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    marks = np.frombuffer(raw, "<i8", num_marks, HEADER.size + 12 * num_sequences)
    in_order = num_marks > 1 and marks[0] == 0 and marks[-1] == num_sequences and np.all(np.diff(marks) >= 0)
    if not in_order or np.any(lengths < 0):
        _refuse(path, f"document marks that rise from 0 to {num_sequences}", "others")
    return code, lengths, pointers, marks


def _map_tokens(path: Path, code: int, num_tokens: int) -> npt.NDArray[np.generic]:
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    expected = num_tokens * dtype.itemsize
    try:
        actual = path.stat().st_size
        if actual != expected:
            _refuse(path, f"{expected} bytes for {num_tokens} tokens", f"{actual}")
        if not num_tokens:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        _refuse(path, "a file that can be read", error.strerror or str(error), error)


def _refuse(path: Path, expected: str, found: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(
        f"{path} is not a whole token shard: expected {expected}, found {found}; tokenise the source again"
    ) from cause


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
