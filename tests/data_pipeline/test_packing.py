import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.manifest import open_tokenizer
from data_pipeline.packing import ShardSource
from data_pipeline.tokenize import tokenize

LENGTHS = [(0, 3), (2, 1), (5, 9), (0, 1), (1, 30), (4, 4), (0, 12), (7, 0)]
RECORDS = [
    {"prompt": chr(97 + index) * prompt, "completion": chr(65 + index) * text}
    for index, (prompt, text) in enumerate(LENGTHS)
]


@pytest.fixture(params=[10**6, 16], ids=["one shard", "many shards"])
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    tokenize(
        str(path),
        tokenizer="bytes",
        out=tmp_path / "data",
        validation_fraction=0,
        max_shard_tokens=request.param,
    )
    return tmp_path / "data"


def written_out(folder: Path) -> list[list[tuple[int, bool]]]:
    """Each document as (token, maskable) pairs, straight from the records."""
    tokenizer = open_tokenizer(folder)
    found = []
    for record in RECORDS:
        prompt, text = tokenizer.encode(record["prompt"]), tokenizer.encode(record["completion"])
        found.append([(token, False) for token in prompt] + [(token, True) for token in [*text, tokenizer.end_id]])
    return found


@pytest.mark.parametrize("length", [1, 2, 7, 16, 40, 87])
def test_concatenated_rows_equal_a_walk_over_the_documents(data: Path, length: int) -> None:
    stream = [
        (token, maskable, number, place)
        for number, document in enumerate(written_out(data))
        for place, (token, maskable) in enumerate(document)
    ]
    source = ShardSource(data, "train", length)
    assert len(source) == len(stream) // length
    rows = source.gather(np.arange(len(source)))
    for row in range(len(source)):
        cut = stream[row * length : (row + 1) * length]
        ids = [item[2] for item in cut]
        positions = [0 if place == 0 else item[3] for place, item in enumerate(cut)]
        for place in range(1, length):
            positions[place] = positions[place - 1] + 1 if ids[place] == ids[place - 1] else 0
        assert rows["tokens"][row].tolist() == [item[0] for item in cut]
        assert rows["maskable"][row].tolist() == [item[1] for item in cut]
        assert rows["document"][row].tolist() == [number - ids[0] for number in ids]
        assert rows["positions"][row].tolist() == positions


@pytest.mark.parametrize("length", [1, 8, 11, 50])
def test_padded_rows_hold_one_document_each(data: Path, length: int) -> None:
    source = ShardSource(data, "train", length, pack="pad")
    pad = open_tokenizer(data).pad_id
    rows = source.gather(np.arange(len(source)))
    documents = written_out(data)
    assert len(source) == len(documents)
    for row, document in enumerate(documents):
        cut = document[:length]
        rest = length - len(cut)
        assert rows["tokens"][row].tolist() == [token for token, _ in cut] + [pad] * rest
        assert rows["maskable"][row].tolist() == [maskable for _, maskable in cut] + [False] * rest
        assert rows["document"][row].tolist() == [0] * len(cut) + [-1] * rest
        assert rows["positions"][row].tolist() == [*range(len(cut))] + [0] * rest


@pytest.mark.parametrize("pack", ["concat", "pad"])
def test_rows_come_by_index_with_their_types_and_survive_pickling(data: Path, pack: str) -> None:
    source = ShardSource(data, "train", 8, pack=pack)  # type: ignore[arg-type]
    everything = source.gather(np.arange(len(source)))
    types = {"tokens": torch.int64, "maskable": torch.bool, "document": torch.int32, "positions": torch.int64}
    assert {name: tensor.dtype for name, tensor in everything.items()} == types
    some = np.array([4, 0, 4])
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for name, tensor in copy.gather(some).items():
            assert torch.equal(tensor, everything[name][some])
            tensor.zero_()  # rows are copies that the caller may change
    assert torch.equal(source.gather(some)["tokens"], everything["tokens"][some])


def test_bad_settings_are_named(data: Path) -> None:
    with pytest.raises(ValueError, match="has 87 tokens, fewer than one row of 88"):
        ShardSource(data, "train", 88)
    with pytest.raises(ValueError, match="unknown packing 'best'; legal: concat, pad"):
        ShardSource(data, "train", 8, pack="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row length is 0"):
        ShardSource(data, "train", 0)
    with pytest.raises(ValueError, match="no documents in split 'test', only in: train"):
        ShardSource(data, "test", 8)
    with pytest.raises(ValueError, match="run `penumbra tokenize"):
        ShardSource(data / "nowhere", "train", 8)
