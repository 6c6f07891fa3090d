import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

import data_pipeline.tokenize as tokenize_module
from data_pipeline.manifest import Manifest, open_prompts, open_shards, open_tokenizer, verify
from data_pipeline.sources import Document
from data_pipeline.tokenize import tokenize

TEXTS = [f"def f{index}():\n    return {index}\n" for index in range(60)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "source.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, TEXTS[3], TEXTS[7]]))
    return str(path)


@pytest.fixture
def data(tmp_path: Path, source: str) -> Path:
    tokenize(source, tokenizer="bytes", out=tmp_path / "data", validation_fraction=0.2, max_shard_tokens=300)
    return tmp_path / "data"


def documents(folder: Path, split: str) -> list[str]:
    tokenizer = open_tokenizer(folder)
    found = []
    for record in Manifest.load(folder).splits[split].shards:
        dataset = IndexedDataset(str(folder / record.prefix))
        found += [tokenizer.decode(dataset[index], keep_special=True) for index in range(len(dataset))]
    return found


def test_every_document_is_in_one_split_once(data: Path) -> None:
    train, validation = documents(data, "train"), documents(data, "validation")
    assert sorted(train + validation) == sorted(f"{text}<|endoftext|>" for text in TEXTS)
    assert 3 <= len(validation) <= 25
    manifest = Manifest.load(data)
    assert manifest.num_duplicates == 2
    assert manifest.splits["train"].num_documents == len(train)
    assert manifest.splits["train"].num_tokens == sum(len(text) - 12 for text in train)
    assert len(manifest.splits["train"].shards) > 2
    assert all(shard.num_tokens <= 300 for shard in manifest.splits["train"].shards)
    verify(data)


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path: Path, data: Path) -> None:
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(json.dumps({"text": text}) for text in ["new", *reversed(TEXTS)]))
    tokenize(str(shuffled), tokenizer="bytes", out=tmp_path / "other", validation_fraction=0.2)
    for split in ("train", "validation"):
        assert set(documents(data, split)) <= set(documents(tmp_path / "other", split))
    tokenize(str(shuffled), tokenizer="bytes", out=tmp_path / "third", validation_fraction=0.2, seed=1)
    assert set(documents(data, "validation")) - set(documents(tmp_path / "third", "validation"))


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, source: str) -> None:
    for name in ("one", "two"):
        tokenize(source, tokenizer="bpe:300", out=tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_no_split_stays_empty(tmp_path: Path, source: str, fraction: float) -> None:
    manifest = tokenize(source, tokenizer="bytes", out=tmp_path / "out", validation_fraction=fraction)
    assert {split.num_documents for split in manifest.splits.values()} == {1, 59}


def test_without_validation_all_is_for_training(tmp_path: Path, source: str) -> None:
    manifest = tokenize(source, tokenizer="bytes", out=tmp_path / "out", validation_fraction=0)
    assert manifest.splits["train"].num_documents == 60
    with pytest.raises(ValueError, match="no documents in split 'validation', only in: train"):
        open_shards(tmp_path / "out", "validation")


def test_prompts_are_measured_in_tokens(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records = [
        {"prompt": "caf\u00e9\n", "completion": "yes"},
        {"text": "plain"},
        {"prompt": "", "completion": "x"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    tokenize(str(path), tokenizer="bytes", out=tmp_path / "out", validation_fraction=0)
    assert open_prompts(tmp_path / "out", "train").tolist() == [6, 0, 0]
    assert documents(tmp_path / "out", "train")[0] == "caf\u00e9\nyes<|endoftext|>"
    (tmp_path / "out" / "train-00000.prompts.npy").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"train-00000\.prompts\.npy"):
        open_prompts(tmp_path / "out", "train")


def test_progress_counts_documents(tmp_path: Path, source: str) -> None:
    seen: list[tuple[int, int]] = []
    tokenize(source, tokenizer="bytes", out=tmp_path / "out", progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 60) for done in range(1, 61)]


def test_what_is_there_is_kept_unless_told(tmp_path: Path, source: str, data: Path) -> None:
    before = (data / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="already holds"):
        tokenize(source, tokenizer="bytes", out=data)
    assert (data / "manifest.json").read_bytes() == before
    tokenize(source, tokenizer="characters", out=data, overwrite=True)
    assert Manifest.load(data).tokenizer.spec == "characters"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not a tokenised data set"):
        tokenize(source, tokenizer="bytes", out=tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").exists()


def test_a_failure_halfway_leaves_nothing(
    tmp_path: Path, source: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails_on_the_second_pass(source: str, **settings: object) -> Iterator[Document]:
        calls.append(source)
        yield from (Document(name=text, text=text) for text in TEXTS)
        if len(calls) == 2:
            raise KeyboardInterrupt

    before = sorted(path.name for path in tmp_path.iterdir())
    content = (data / "manifest.json").read_bytes()
    monkeypatch.setattr(tokenize_module, "read_documents", fails_on_the_second_pass)
    with pytest.raises(KeyboardInterrupt):
        tokenize(source, tokenizer="bytes", out=data, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (data / "manifest.json").read_bytes() == content


def test_illegal_settings_are_refused_before_anything_is_written(tmp_path: Path, source: str) -> None:
    one = tmp_path / "one.txt"
    one.write_text("only")
    blocked = tmp_path / "one.txt" / "out"
    cases = [
        (source, "bytes", tmp_path / "out", 1.0, "validation_fraction is 1.0"),
        (source, "byte", tmp_path / "out", 0.1, "legal: bytes"),
        (str(one), "bytes", tmp_path / "out", 0.1, "set validation_fraction to 0"),
        (str(tmp_path / "none"), "bytes", tmp_path / "out", 0.1, "does not exist"),
        (source, "bytes", blocked, 0.1, "cannot be written"),
    ]
    for text, tokenizer, out, fraction, message in cases:
        with pytest.raises(ValueError, match=message):
            tokenize(text, tokenizer=tokenizer, out=out, validation_fraction=fraction)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "source.jsonl"]


def test_the_manifest_comes_back(data: Path) -> None:
    manifest = Manifest.load(data)
    manifest.save(data)
    assert Manifest.load(data) == manifest


def test_a_bad_manifest_says_what_to_run(data: Path) -> None:
    path = data / "manifest.json"
    fields = json.loads(path.read_text())
    for content in ("{", "[]", json.dumps(fields | {"version": 2}), json.dumps(fields | {"new": 1})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json .* run `penumbra tokenize"):
            Manifest.load(data)
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no tokenised data .* run `penumbra tokenize"):
        Manifest.load(data)


def test_verification_finds_one_flipped_bit(data: Path) -> None:
    path = data / "train-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[11] ^= 1
    path.write_bytes(raw)
    open_shards(data, "train")
    with pytest.raises(ValueError, match=r"1 files that differ from its manifest \(train-00001\.bin\)"):
        verify(data)


def test_a_shard_of_another_data_set_is_refused(data: Path) -> None:
    for suffix in (".bin", ".idx"):
        (data / f"train-00000{suffix}").write_bytes((data / f"validation-00000{suffix}").read_bytes())
    shards = Manifest.load(data).splits
    assert shards["train"].shards[0].num_tokens != shards["validation"].shards[0].num_tokens
    with pytest.raises(ValueError, match=r"train-00000 holds .* the manifest says"):
        open_shards(data, "train")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, source: str, data: Path) -> None:
    tokenize(source, tokenizer="bpe:300", out=tmp_path / "other")
    good = (data / "tokenizer" / "tokenizer.json").read_text()
    (data / "tokenizer" / "tokenizer.json").write_bytes((tmp_path / "other/tokenizer/tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="tokens, the manifest says 259"):
        open_tokenizer(data)
    changed = json.loads(good)
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (data / "tokenizer" / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="did not make these tokens"):
        open_tokenizer(data)


def test_prompt_files_hold_int32(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c"}))
    tokenize(str(path), tokenizer="bytes", out=tmp_path / "out", validation_fraction=0)
    assert np.load(tmp_path / "out" / "train-00000.prompts.npy").dtype == np.int32


def test_a_replacement_that_fails_brings_the_old_data_back(
    source: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (data / "manifest.json").read_bytes()
    rename = Path.rename

    def fails_into_place(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(ValueError, match=r"data cannot be written \(no\)"):
        tokenize(source, tokenizer="characters", out=data, overwrite=True)
    assert (data / "manifest.json").read_bytes() == content
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "source.jsonl"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"out cannot be written \(No space left on device\); give a folder"):
        tokenize(source, tokenizer="bytes", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_cleared_up(tmp_path: Path, source: str) -> None:
    host = platform.node()
    alive = tmp_path / f"out.tmp-{host}-{os.getppid()}"
    other = tmp_path / f"out.tmp-{host}x-{dead_process()}"
    for left in (
        tmp_path / f"out.tmp-{host}-{dead_process()}",
        tmp_path / f"out.tmp-{host}-{os.getpid()}",
        alive,
        other,
    ):
        left.mkdir()
        (left / "train-00000.bin").write_bytes(b"half")
    tokenize(source, tokenizer="bytes", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source.jsonl", alive.name, other.name}
    verify(tmp_path / "out")


def test_data_that_a_killed_process_moved_aside_comes_back(source: str, data: Path) -> None:
    data.rename(data.with_name(f"data.old-{platform.node()}-{dead_process()}"))
    with pytest.raises(ValueError, match="already holds"):
        tokenize(source, tokenizer="bytes", out=data)
    verify(data)
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "source.jsonl"]


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_working_directory_is_not_replaced(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="holds the working directory"):
        tokenize(source, tokenizer="bytes", out=Path(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "source.jsonl"]
