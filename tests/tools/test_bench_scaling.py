"""The benchmark of scaling: speeds and ratios of known seconds, turns, and a small measurement."""

import json
from pathlib import Path

import pytest

from launchers.cli import Benchmark
from model.config import TransformerConfig
from tools.bench import run_benchmark, scaling
from tools.bench.scaling import REPLICAS, TARGETS, WORK, Turns, Work, as_table, measure, summarise

SMALL = Work(TransformerConfig(dim=16, num_layers=1, num_heads=2), vocab_size=40, length=16, tokens=64, steps=2)


def test_a_shared_step_takes_as_long_as_its_slowest_process() -> None:
    rounds = [
        {"together": [2.0, 4.0], "sharded": [8.0, 5.0], "alone": [2.0, 4.0]},
        {"together": [9.0, 9.0], "sharded": [9.0, 9.0], "alone": [90.0, 90.0]},
        {"together": [1.0, 4.0], "sharded": [8.0, 8.0], "alone": [4.0, 2.0]},
    ]
    results = summarise(rounds, tokens=1000)
    assert results["scaling.together.tokens_per_second"] == 500
    assert results["scaling.sharded.tokens_per_second"] == 250
    assert results["scaling.alone.tokens_per_second"] == 750
    assert results["scaling.efficiency"] == pytest.approx(2 / 3)
    assert results["scaling.sharded.efficiency"] == pytest.approx(1 / 3)


class Line:
    """A connection that ends after some turns."""

    def __init__(self, turns: int) -> None:
        self.turns, self.sent, self.heard = turns, [], []  # type: ignore[var-annotated]

    def send(self, seconds: float) -> None:
        self.sent.append(seconds)

    def recv(self) -> str:
        self.heard.append(len(self.sent))
        if len(self.heard) > self.turns:
            raise EOFError
        return "go"


def test_a_run_waits_before_every_turn_and_ends_after_the_last() -> None:
    line = Line(turns=3)
    hook = Turns(line, steps=4)  # type: ignore[arg-type]
    waited = []
    for step in range(1, 13):
        before = len(line.heard)
        hook.on_step_start(step)
        if len(line.heard) > before:
            waited.append(step)
    assert waited == [1, 5, 9]
    assert line.heard == [0, 1, 2], "every turn but the first begins with the seconds of the one before"
    with pytest.raises(EOFError):
        hook.on_step_start(13)
    assert len(line.sent) == 3
    assert min(line.sent) >= 0


@pytest.mark.slow
def test_every_group_trains() -> None:
    results = measure(1, SMALL)
    assert results.keys() == TARGETS.keys() | {
        "scaling.sharded.efficiency",
        *(f"scaling.{name}.tokens_per_second" for name in REPLICAS),
    }
    assert min(results.values()) > 0


def test_the_model_is_the_one_that_is_promised() -> None:
    backbone = WORK.model.backbone
    assert (backbone.num_layers, backbone.dim, WORK.tokens) == (12, 256, 4096)
    assert WORK.model.mask_id == 50_257, "the tokens of GPT-2, and the mask after them"


def test_the_record_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ratio, verdict in ((0.93, "met"), (0.91, "missed")):
        results = {"scaling.efficiency": ratio}
        monkeypatch.setattr(scaling, "measure", lambda repeats, found=results: found)
        run_benchmark(Benchmark.scaling.value, repeats=5, json_file=tmp_path / "record.json")
        assert json.loads((tmp_path / "record.json").read_text())["results"] == results
        assert capsys.readouterr().out == as_table(results) + "\n"
        assert as_table(results).endswith(f"target at least 0.92: {verdict}")
