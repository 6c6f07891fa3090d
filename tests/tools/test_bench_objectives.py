"""The benchmark of objectives: counted operations, network calls, ratios of known times, the record and its table."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.sampling.hints import HintPolicy
from eval.sampling.loop import Policies
from launchers.cli import Benchmark
from model.config import TransformerConfig
from tools.bench import objectives, run_benchmark
from tools.bench.objectives import SAMPLING_STEPS, TARGETS, Shape, measure, systems

SMALL = Shape(
    backbone=TransformerConfig(dim=64, num_layers=2, num_heads=2),
    vocab_size=40,
    num_sequences=4,
    length=64,
    block_size=8,
)
SYSTEMS = ("cadd", "vadd", "vmd", "block", "block_vmd")


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system takes 4 seconds and MDLM 1."""

    def known(sides: Mapping[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
        for side in sides.values():
            side()
        others = [name for name in sides if name != "mdlm"]
        return {"mdlm": 1.0} | dict.fromkeys(others, 4.0), dict.fromkeys(others, 0.25)

    monkeypatch.setattr(objectives, "beside_the_first", known)


def counted(name: str) -> int:
    """Operations of a training step as PyTorch counts them."""
    config = systems(SMALL)[name]
    engine = objectives._engine(config)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        objectives._training_step(engine, config, SMALL)
    return int(counter.get_total_flops())


@pytest.mark.usefixtures("known_times")
def test_ratios_follow_from_times_and_counted_operations() -> None:
    results = measure(1, SMALL)
    tokens = SMALL.num_sequences * SMALL.length
    plain = counted("mdlm")
    assert results["objectives.mdlm.tokens_per_second"] == tokens
    assert results["objectives.mdlm.gflop"] == pytest.approx(plain / 1e9, rel=0.01)
    for name in SYSTEMS:
        flop_ratio = counted(name) / plain
        # the latent's own small layers are not counted
        assert results[f"objectives.{name}.flop_ratio"] == pytest.approx(flop_ratio, rel=0.03)
        assert results[f"objectives.{name}.tokens_per_second"] == tokens / 4
        assert results[f"objectives.{name}.tokens_per_second_ratio"] == 0.25
        assert results[f"objectives.{name}.of_flop_ratio"] == pytest.approx(0.25 * flop_ratio, rel=0.03)
    assert results["objectives.sampling.mdlm.tokens_per_second"] == tokens * SAMPLING_STEPS
    assert results["objectives.sampling.latent.tokens_per_second_ratio"] == 0.25
    assert [results[f"objectives.sampling.k{k}.of_k1_ratio"] for k in (2, 3, 4)] == [2, 3, 4]
    plain, *hinted = (results[f"objectives.sampling.{name}.gflop"] for name in ("mdlm", "k1", "k2", "k3", "k4"))
    assert hinted[0] == pytest.approx(plain, rel=0.1)  # and the product with the embeddings, for the next hint
    assert [flops / hinted[0] for flops in hinted[1:]] == pytest.approx([2, 3, 4], rel=0.01)
    assert results["objectives.sampling.latent.flop_ratio"] == pytest.approx(1.0, rel=0.1)
    assert TARGETS.keys() <= results.keys()


@pytest.mark.usefixtures("known_times")
def test_memory_grows_with_what_is_computed() -> None:
    """Two streams hold twice the activations; a recognition network adds its own to the denoiser's."""
    results = measure(1, SMALL)
    ratio = {name: results[f"objectives.{name}.memory_ratio"] for name in SYSTEMS}
    assert ratio["cadd"] < 1.3
    assert ratio["block"] > 1.3
    assert 1.0 < ratio["vmd"] < ratio["vadd"]
    assert ratio["block_vmd"] > ratio["block"]


@pytest.mark.parametrize("num_hints", [1, 3])
def test_a_sampler_makes_one_network_call_for_every_step_and_hint(num_hints: int) -> None:
    sampler = objectives._sampler(systems(SMALL)["cadd"], SMALL, Policies(hints=HintPolicy(num_hints=num_hints)))
    calls: list[int] = []
    sampler.args[0].denoiser.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    hidden_before = sampler.args[1].masked_BL.float().mean()  # type: ignore[attr-defined]
    assert hidden_before == pytest.approx(0.5, abs=0.1)
    assert not sampler().masked_BL.any()
    assert len(calls) == SAMPLING_STEPS * num_hints


def test_a_step_trains() -> None:
    config = systems(SMALL)["block_vmd"]
    engine = objectives._engine(config)
    before = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    objectives._training_step(engine, config, SMALL)
    unchanged = [name for name, p in engine.model.named_parameters() if torch.equal(p, before[name])]
    assert "denoiser.embed.weight" not in unchanged
    assert "denoiser.head.weight" not in unchanged


def test_the_record_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = dict.fromkeys(TARGETS, 2.0) | {"objectives.vmd.of_flop_ratio": 0.5}
    monkeypatch.setattr(objectives, "measure", lambda repeats: results)
    run_benchmark(Benchmark.objectives.value, repeats=3, json_file=tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["results"] == results
    assert record["settings"]["repeats"] == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in lines if "target" in line].count("missed") == 1
    assert any(line.startswith("objectives.vmd.of_flop_ratio") and line.endswith("missed") for line in lines)
