"""What the tests of runs share: a small tokenised data set, small runs on it, and the losses they leave behind."""

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.tokenize import tokenize
from pretrain.config import RunConfig
from pretrain.hooks.metrics import read_metrics
from pretrain.settings import validate

MakeConfig = Callable[..., RunConfig]
Trace = dict[int, dict[str, Any]]
SmallDisk = Callable[[Path, str], AbstractContextManager[None]]


def write_documents(folder: Path, count: int = 60) -> Path:
    """Python files of a few lines each."""
    folder.mkdir()
    rng = random.Random(0)
    for number in range(count):
        lines = [f"def f{number}_{line}(x):\n    return x * {rng.randrange(100)}\n" for line in range(4)]
        (folder / f"m{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of source files."""
    return write_documents(tmp_path_factory.mktemp("text") / "source")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> Path:
    """The documents in bytes, a fifth of them held out."""
    out = tmp_path_factory.mktemp("data") / "shards"
    tokenize(str(documents), tokenizer="bytes", out=out, validation_fraction=0.2)
    return out


@pytest.fixture(scope="session")
def make_config(shards: Path) -> MakeConfig:
    """A run of seconds in a folder, with overrides."""

    def make(folder: Path, *overrides: str) -> RunConfig:
        tree = {
            "name": "small",
            "folder": str(folder),
            "data": {"kind": "shards", "path": str(shards), "length": 32, "num_workers": 0},
            "model": {"backbone": {"dim": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.1}},
            "optim": {"lr": 3e-3, "warmup_steps": 4},
            "train": {"steps": 12, "batch_tokens": 512, "ema_decay": 0.9},
            "log": {"every": 1},
            "validation": {"every": 6, "num_sequences": 7},
            "checkpoint": {"every": 4, "keep": 9},
        }
        return validate(tree, overrides)

    return make


@pytest.fixture(scope="session")
def write_config() -> Callable[[RunConfig, Path], Path]:
    """Saves a configuration where a command line can read it."""

    def write(config: RunConfig, path: Path) -> Path:
        from pretrain.settings import dump_config

        path.write_text(dump_config(config))
        assert yaml.safe_load(path.read_text())["name"] == config.name
        return path

    return write


@pytest.fixture(scope="session")
def trace() -> Callable[[Path], Trace]:
    """What a run logged, by step: the later line wins, and how long it took and in how much memory is left out."""

    def read(folder: Path) -> Trace:
        timing = {"kind", "seconds", "processor_seconds", "tokens_per_second", "mfu", "peak_memory"}
        lines = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("kind") in ("train", "validation")]
        steps: Trace = {}
        for line in lines:
            kept = {f"{line['kind']}.{key}": value for key, value in line.items() if key not in timing}
            steps[line["step"]] = steps.get(line["step"], {}) | kept
        return steps

    return read


@pytest.fixture(scope="session")
def small_disk() -> SmallDisk:
    """A file system of its own at a place, of a size such as 1m."""

    @contextmanager
    def mounted(place: Path, size: str) -> Iterator[None]:
        place.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        result = subprocess.run(mount, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a small tmpfs can not be mounted here: {result.stderr.strip()}")
        try:
            yield
        finally:
            subprocess.run(["umount", place], check=True)

    return mounted
