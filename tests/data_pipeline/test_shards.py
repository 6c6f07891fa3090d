import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_pipeline.shards import Shard, ShardWriter


def some_documents(vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, length).tolist() for length in (5, 1, 300, 17)]
    documents[0][0] = vocab_size - 1
    return documents


def write(prefix: Path, vocab_size: int = 100) -> list[list[int]]:
    documents = some_documents(vocab_size)
    with ShardWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return documents


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 151_936])
def test_megatron_reads_our_shard(tmp_path: Path, vocab_size: int) -> None:
    documents = write(tmp_path / "x", vocab_size)
    dataset = IndexedDataset(str(tmp_path / "x"), mmap=True)
    assert dataset.index.dtype is DType.optimal_dtype(vocab_size)
    assert len(dataset) == len(documents)
    assert [dataset[index].tolist() for index in range(len(documents))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_wrote(tmp_path: Path, dtype: type[np.number]) -> None:
    documents = some_documents(1000)
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    for document in documents[:2]:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.add_document(torch.tensor(documents[2] + documents[3]), [len(documents[2]), len(documents[3])])
    builder.finalize(str(tmp_path / "x.idx"))
    shard = Shard(tmp_path / "x")
    assert shard.lengths.tolist() == [5, 1, 317]
    assert shard.offsets.tolist() == [0, 5, 6, 323]
    assert shard.tokens(0, shard.num_tokens).tolist() == list(chain.from_iterable(documents))


def test_our_shard_comes_back(tmp_path: Path) -> None:
    documents = write(tmp_path / "x")
    stream = list(chain.from_iterable(documents))
    for shard in (Shard(tmp_path / "x"), pickle.loads(pickle.dumps(Shard(tmp_path / "x")))):
        assert (shard.num_documents, shard.num_tokens) == (4, len(stream))
        assert shard.tokens(3, 9).tolist() == stream[3:9]
    assert len(pickle.dumps(Shard(tmp_path / "x"))) < 300  # the path travels, not the tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path / "x", 10) as writer:
            writer.add([1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_vocabulary_are_a_bug(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x", 10)
    for ids in ([10], [-1], []):
        with pytest.raises(AssertionError):
            writer.add(ids)


def damage(path: Path, change: str) -> None:
    raw = bytearray(path.read_bytes())
    if change == "truncate":
        raw = raw[:-3]
    elif change == "cut":
        raw = raw[:20]
    elif change == "empty":
        raw = bytearray()
    elif change == "grow":
        raw += b"xx"
    else:
        raw[int(change)] ^= 0x41
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        *((".bin", change) for change in ("truncate", "empty", "grow")),
        *((".idx", change) for change in ("truncate", "cut", "empty", "grow")),
        *((".idx", str(place)) for place in (0, 9, 17, 18, 26, 34, 50, 60, 82)),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path: Path, suffix: str, change: str) -> None:
    write(tmp_path / "x")
    damage(tmp_path / f"x{suffix}", change)
    with pytest.raises(ValueError, match=r"x\.(bin|idx) is not a whole token shard: expected .*tokenise the source"):
        Shard(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=r"x\.bin is not a whole"):
        Shard(tmp_path / "x")
    (tmp_path / "x.idx").unlink()
    with pytest.raises(ValueError, match=r"x\.idx is not a whole"):
        Shard(tmp_path / "x")
