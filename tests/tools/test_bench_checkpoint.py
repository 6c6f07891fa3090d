"""The benchmark of checkpoints: what it counts, and its record and table."""

import json
from pathlib import Path

import pytest

from launchers.cli import Benchmark
from model.config import ModelConfig, TransformerConfig
from tools.bench import checkpoint, run_benchmark
from tools.bench.checkpoint import MODEL, TARGETS, measure

SMALL = ModelConfig(
    backbone=TransformerConfig(dim=32, num_layers=1, num_heads=2, tie_embeddings=True), vocab_size=1000, mask_id=999
)


def test_it_saves_weights_and_both_moments() -> None:
    """Of the small model: embeddings, four square matrices and a network of four times the width, with its norms."""
    results = measure(1, SMALL)
    matrices = 1000 * 32 + 4 * 32 * 32 + 2 * 4 * 32 * 32
    assert matrices < results["checkpoint.megabytes"] * 1e6 / 12 < 1.1 * matrices
    assert TARGETS.keys() <= results.keys()
    ratio = results["checkpoint.stall_seconds"] / results["checkpoint.synchronous_seconds"]
    assert results["checkpoint.stall_ratio"] == pytest.approx(ratio)
    assert results["checkpoint.stall_seconds"] <= results["checkpoint.sealed_seconds"]


def test_the_model_is_large_enough_to_tell() -> None:
    b = MODEL.backbone
    assert 12 * (MODEL.vocab_size * b.dim + b.num_layers * 12 * b.dim**2) >= 500e6


def test_the_record_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ratio, verdict in ((0.2, "met"), (0.3, "missed")):
        results = {"checkpoint.stall_ratio": ratio, "checkpoint.megabytes": 600.0}
        monkeypatch.setattr(checkpoint, "measure", lambda repeats, found=results: found)
        run_benchmark(Benchmark.checkpoint.value, repeats=3, json_file=tmp_path / "record.json")
        record = json.loads((tmp_path / "record.json").read_text())
        assert record["results"] == results
        assert record["settings"]["repeats"] == 3
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"target at most 0.25: {verdict}")
