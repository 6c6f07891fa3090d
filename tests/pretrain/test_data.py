"""Data made on the way to a run: once, also for runs that start side by side, and an error where it can not be made."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain import data
from pretrain.data_config import PrepareConfig, ShardData
from pretrain.parallel.mesh import Axis


def test_runs_side_by_side_tokenise_once(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    prepare = data._prepare

    def slowly(config: PrepareConfig, folder: Path) -> None:
        made.append(folder)
        time.sleep(0.3)  # the others arrive meanwhile
        prepare(config, folder)

    monkeypatch.setattr(data, "_prepare", slowly)
    settings = PrepareConfig(source=str(documents), tokenizer="bytes", validation_fraction=0.2)
    config = ShardData(path=str(tmp_path / "new" / "shards"), length=32, prepare=settings)
    with ThreadPoolExecutor(3) as runs:
        opened = list(runs.map(lambda _: data.open_data(config, Axis()), range(3)))
    assert made == [tmp_path / "new" / "shards"]
    assert len({len(each.train) for each in opened}) == 1


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path, documents: Path) -> None:
    (tmp_path / "file").write_text("")
    config = ShardData(
        path=str(tmp_path / "file" / "shards"),
        length=32,
        prepare=PrepareConfig(source=str(documents), tokenizer="bytes"),
    )
    with pytest.raises(ValueError, match=r"data\.path=.*file/shards can not be made"):
        data.open_data(config, Axis())
