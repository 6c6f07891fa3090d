"""Plans against what happens: a real step's allocations, traffic worked out by hand, and what does not fit."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.tokenize import tokenize
from data_pipeline.tokenizers import Tokenizer
from launchers.cli import PlannedGpu, app
from model.batch import Batch
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.flops import training_flops
from model.noise import NoiseKey
from pretrain.config import RunConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from pretrain.recipes import build
from pretrain.settings import validate
from tools.bench.memory import peak_extra_bytes
from tools.plan.estimate import estimate
from tools.plan.machines import GPUS, find
from tools.plan.page import _count, _duration, _flops, _size, results_of
from tools.plan.suggest import suggestions
from tools.plan.trace import _with_vocabulary, trace

LATENT = ("model.latent.dim=16", "model.latent.recognition.num_layers=1", "model.backbone.condition_dim=32")
SYSTEMS = {
    "mdlm": (),
    "recomputed": ("train.recompute=full",),
    "bf16": ("train.precision=bf16",),
    "cadd": ("model.augmentation.hint_half_life=0.4",),
    "vadd": LATENT,
    "block_vmd": (*LATENT, "model.block_size=8"),
}
ROWS, LENGTH, VOCABULARY, DIM, LAYERS = 8, 64, 1000, 128, 4


def small(*overrides: str) -> RunConfig:
    tree = {
        "name": "small",
        "data": {"kind": "shards", "path": "nowhere", "length": LENGTH},
        "model": {
            "backbone": {"dim": DIM, "num_layers": LAYERS, "num_heads": 4, "qkv_bias": False},
            "vocab_size": VOCABULARY,
        },
        "train": {"steps": 100, "batch_tokens": ROWS * LENGTH},
    }
    return validate(tree, overrides)


def measured_peak(config: RunConfig) -> tuple[int, int]:
    """Bytes above weights and optimizer state in a real step on this CPU, and the bytes of those."""
    model = replace(config.model, mask_id=VOCABULARY - 1)
    engine = FsdpEngine(model, config.optim, config.train, config.parallel, single_process(), seed=0)
    tokens_BL = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        positions_BL=torch.arange(LENGTH).expand(ROWS, LENGTH),
        index_B=torch.arange(ROWS),
        document_BL=torch.zeros_like(tokens_BL, dtype=torch.int32),
    )
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), model)

    def step() -> None:
        engine.forward_backward(Micro(batch, corruption, StepSchedule()), scale=1.0, last=True)
        engine.reduce_and_clip(1.0)
        engine.step(lr=1e-4, take=torch.ones(()))

    step()  # what is cached is cached
    standing = sum(t.numel() * t.element_size() for named in engine.state_dict().values() for t in named.values())
    return peak_extra_bytes(step), standing


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_peak_is_what_the_profiler_sees(system: str) -> None:
    config = small(*SYSTEMS[system])
    extra, standing = measured_peak(config)
    planned = trace(config, 1, on_gpu=False)
    assert planned.parameters + planned.optimizer == standing
    assert planned.peak - standing == pytest.approx(extra, rel=0.1)
    assert planned.peak == pytest.approx(extra + standing, rel=0.1)


def test_weights_are_gathered_twice_and_gradients_reduced_once() -> None:
    """By hand: every rank receives 7/8 of bf16 weights twice, of float32 gradients once; the root stays gathered."""
    planned = trace(small("train.precision=bf16", f"train.batch_tokens={8 * LENGTH}"), 8)
    weights = planned.num_parameters
    in_blocks = LAYERS * 12 * DIM * DIM
    least, most = ((2 * (weights + blocks) + 4 * weights) * 7 / 8 for blocks in (0.9 * in_blocks, weights))
    assert planned.sent.keys() == {"weights"}
    assert least <= planned.sent["weights"] <= 1.02 * most
    assert planned.parameters == pytest.approx(4 * weights / 8, rel=0.02)
    assert planned.optimizer == 2 * planned.parameters
    assert planned.gradients == planned.parameters


def test_replicas_add_up_their_gradients() -> None:
    config = small("parallel.replicate=2", f"train.batch_tokens={8 * LENGTH}")
    planned = trace(config, 8)
    assert planned.axes["replicate"] == (0, 4)
    assert planned.sent["replicate"] == pytest.approx(2 * planned.gradients / 2, rel=0.05)


def test_whole_gradients_wait_between_micro_batches() -> None:
    one = trace(small(f"train.batch_tokens={32 * LENGTH}"), 8)
    four = trace(small(f"train.batch_tokens={32 * LENGTH}", f"train.micro_batch_tokens={LENGTH}"), 8)
    assert (one.num_micros, one.accumulated) == (1, 0)
    assert (four.num_micros, four.micro_rows) == (4, 1)
    assert four.accumulated == pytest.approx(4 * four.num_parameters, rel=0.05)
    assert four.activations < one.activations / 2
    assert four.masked_share == pytest.approx(one.masked_share)
    assert four.sent["weights"] > 2 * one.sent["weights"]


def test_a_step_is_as_long_as_the_longer_of_computing_and_sending() -> None:
    config = small(f"train.batch_tokens={1024 * LENGTH}", f"train.micro_batch_tokens={LENGTH}")
    traced, gpu = trace(config, 16), find("h100")
    fast = estimate(config, traced, gpu, nodes=2, gpus_per_node=8)
    slow = estimate(config, traced, replace(gpu, outside=gpu.outside / 1e4), nodes=2, gpus_per_node=8)
    assert fast.step_seconds >= fast.compute_seconds
    busbar = min(gpu.inside, 8 * gpu.outside)
    assert slow.sending["weights"] == pytest.approx(fast.sending["weights"] * busbar / (8 * gpu.outside / 1e4))
    assert slow.step_seconds == pytest.approx(slow.sending["weights"] + slow.optimizer_seconds)
    assert fast.days == config.train.steps * fast.step_seconds / 86_400
    assert fast.tokens_per_second == pytest.approx(1024 * LENGTH / fast.step_seconds)


def test_an_axis_has_the_adapters_of_its_own_ranks() -> None:
    """Replicas lie one to a node, in pairs that each have one adapter; shards stay within a node."""
    config, gpu = small("parallel.replicate=2", f"train.batch_tokens={16 * LENGTH}"), find("a100-80")
    plan = estimate(config, trace(config, 16), gpu, nodes=2, gpus_per_node=8)
    assert plan.trace.axes == {"weights": tuple(range(8)), "replicate": (0, 8)}
    assert plan.sending["replicate"] == pytest.approx(plan.trace.sent["replicate"] / (0.8 * gpu.outside))
    assert plan.sending["weights"] == pytest.approx(plan.trace.sent["weights"] / (0.8 * gpu.inside))


def test_offloaded_weights_gradients_and_moments_are_on_the_host() -> None:
    """By hand: float32 shards go up for every gathering (the root stays gathered), gradients come down once."""
    here, config = trace(small(), 8), small("parallel.offload=true")
    there = trace(config, 8)
    shard = here.parameters
    assert (here.host, there.parameters, there.activations) == (0, shard, here.activations)
    assert there.host == pytest.approx(4 * shard, rel=0.02)
    assert 3 * shard <= here.peak - there.peak <= 4 * shard
    in_blocks = 4 * LAYERS * 12 * DIM * DIM / 8
    assert 2 * shard + 0.9 * in_blocks <= there.sent["host"] <= 3 * shard
    gpu = find("a100-80")
    plan = estimate(config, there, gpu, nodes=1, gpus_per_node=8)
    assert plan.sending["host"] == pytest.approx(there.sent["host"] / (0.8 * gpu.pcie))
    assert plan.optimizer_seconds == pytest.approx(7 / 3 * 3 * shard / gpu.host_bandwidth)


def test_offloaded_micro_batches_still_wait_whole_on_the_gpu() -> None:
    settings = ("parallel.offload=true", f"train.batch_tokens={32 * LENGTH}", f"train.micro_batch_tokens={LENGTH}")
    planned = trace(small(*settings), 8)
    assert planned.accumulated == pytest.approx(4 * planned.num_parameters, rel=0.05)
    assert planned.sent["host"] > 2 * trace(small("parallel.offload=true"), 8).sent["host"]


def test_what_does_not_fit_comes_with_settings_that_do() -> None:
    config = small(f"train.batch_tokens={64 * LENGTH}")
    gpu = GPUS["h100"]

    def plan(changed: RunConfig, memory: float) -> "object":
        return estimate(changed, trace(changed, 2), replace(gpu, memory=memory), nodes=1, gpus_per_node=2)

    whole = trace(config, 2).peak
    lines = suggestions(config, lambda changed: plan(changed, whole / 2 / 0.9))  # type: ignore[arg-type, return-value]
    assert lines[0].startswith("train.recompute=full: ")
    assert lines[-1].endswith("GiB, fits")
    hopeless = suggestions(config, lambda changed: plan(changed, 1.0))  # type: ignore[arg-type, return-value]
    assert "more GPUs" in hopeless[-1]
    sharded = trace(
        small(f"train.batch_tokens={2 * LENGTH}", "train.recompute=full", "parallel.tensor=2"), 2
    ).parameters
    last = small(f"train.batch_tokens={2 * LENGTH}", "train.recompute=full", f"train.micro_batch_tokens={LENGTH}")
    offloaded = trace(replace(last, parallel=replace(last.parallel, offload=True)), 2).peak
    assert offloaded < 4 * sharded
    lines = suggestions(last, lambda changed: plan(changed, 1.01 * offloaded / 0.9))  # type: ignore[arg-type, return-value]
    assert lines[-1].startswith("parallel.offload=true: ")
    assert "on the host, fits" in lines[-1]


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        (("train.precision=bf16",), {"bidirectional documents": "flash"}),
        ((), {"bidirectional documents": "flex"}),
        (("train.precision=bf16", "model.block_size=8"), {"blocks documents": "flex"}),
        (("train.precision=bf16", "train.attention=sdpa"), {"bidirectional documents": "sdpa"}),
        (("train.attention=flex", "model.block_size=8"), {"blocks documents": "flex"}),
        (
            ("train.precision=bf16", "train.attention_anneal=window", "train.attention_anneal_steps=9"),
            {"annealing documents": "flex"},
        ),
    ],
)
def test_attention_is_what_a_gpu_would_choose(settings: tuple[str, ...], kernels: dict[str, str]) -> None:
    assert trace(small(*settings), 1).kernels == kernels


def test_rows_without_documents_need_no_kernel_of_their_own() -> None:
    sudoku = {"data": {"kind": "sudoku"}, "train": {"batch_tokens": 16 * ROWS, "precision": "bf16"}}
    tree = {"name": "sudoku", "model": {"backbone": {"dim": 32, "num_heads": 2}, "vocab_size": 8}}
    assert trace(validate({**tree, **sudoku}, ()), 1).kernels == {"bidirectional": "sdpa"}


@pytest.mark.parametrize("attention", ["flash", "flex"])
def test_kernels_without_scores_keep_memory_linear_in_length(attention: str) -> None:
    """Four times the length at the same number of tokens: SDPA's dense masks grow, these kernels' memory does not."""
    short, long = 8 * LENGTH, 32 * LENGTH

    def kept(name: str, length: int) -> int:
        settings = (f"train.attention={name}", "train.precision=bf16", f"data.length={length}")
        return trace(small(*settings, f"train.batch_tokens={2 * long}"), 1).activations

    assert kept(attention, long) == pytest.approx(kept(attention, short), rel=0.02)
    assert kept("sdpa", long) - kept(attention, long) >= 2 * long**2


def test_what_attention_keeps_is_its_inputs_output_and_logsumexp() -> None:
    """By hand, in bfloat16 in each layer; the same of both kernels, whose lists of tiles alone differ."""
    flash, flex = (trace(small(f"train.attention={name}", "train.precision=bf16"), 1) for name in ("flash", "flex"))
    assert flash.activations == pytest.approx(flex.activations, rel=1e-3)
    recomputed = trace(small("train.attention=flash", "train.precision=bf16", "train.recompute=full"), 1)
    positions = ROWS * LENGTH
    least = LAYERS * positions * (4 * DIM * 2 + 4 * 4)
    assert flash.activations - recomputed.activations >= least


def test_rates_are_of_one_gpu_however_the_work_is_divided() -> None:
    """A GPU's share of the useful work, over the time and the peak, where rows, positions and matrices are divided."""
    gpu = find("h100")
    whole = trace(small(), 1).num_parameters
    for precision, divided, peak in (
        ("fp32", ("parallel.tensor=2",), gpu.fp32_flops),
        ("bf16", ("parallel.tensor=2", "parallel.context=2"), gpu.flops),
    ):
        config = small(f"train.batch_tokens={64 * LENGTH}", f"train.precision={precision}", *divided)
        plan = estimate(config, trace(config, 8), gpu, nodes=1, gpus_per_node=8)
        rows, masked = 64, round(64 * LENGTH * plan.trace.masked_share)
        useful = training_flops(plan.trace.model, num_sequences=rows, length=LENGTH, num_rows=masked)
        assert plan.mfu == pytest.approx(useful / 8 / plan.step_seconds / peak)
        assert plan.compute_seconds == pytest.approx(useful / 8 / (peak * gpu.reached))
        assert plan.trace.masked_share == pytest.approx(0.5, abs=0.1)
        assert plan.trace.num_parameters == whole
        assert results_of(plan)["plan.tokens_per_second_per_gpu"] * 8 * plan.step_seconds == pytest.approx(64 * LENGTH)


@pytest.mark.slow
def test_the_coder_fits_on_64_gpus(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", "coder_7b_cadd", "--nodes", "8", "--gpus-per-node", "8", "--gpu", "a100-80"]
    answer = CliRunner().invoke(app, [*arguments, "--json", str(out)])
    assert answer.exit_code == 0, answer.output
    results = json.loads(out.read_text())["results"]
    assert results["plan.fits"] == 1.0
    assert results["plan.parameters_gib"] == pytest.approx(7.62e9 * 4 / 64 / 2**30, rel=0.01)
    assert 10 < results["plan.peak_gib"] < 72
    assert results["plan.days"] == pytest.approx(
        65.0e9 / 64 / results["plan.tokens_per_second_per_gpu"] / 86_400, rel=0.01
    )
    assert "fits" in answer.output


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: trace(build("owt_mdlm"), 8), r"model\.vocab_size=50258"),
        (lambda: trace(small(), 3), r"8 rows .*does not divide among 3 processes"),
        (lambda: trace(small("parallel.tensor=2"), 3), "3 processes do not divide"),
        (lambda: trace(small("parallel.offload=true"), 1), "parallel.offload=true shards over processes"),
        (lambda: trace(small("train.attention=flash"), 1), "flash computes in .*, not in float32"),
        (
            lambda: trace(small("train.attention=flash", "train.precision=bf16", "model.block_size=8"), 1),
            "flash can not express a mask of blocks, .*: set train.attention=flex",
        ),
        (lambda: trace(small("train.attention=flex", "parallel.context=2"), 2), "flex can not divide positions"),
        (lambda: find("v100"), "v100 is not in the table: use one of a100-80, h100, h200"),
    ],
)
def test_mistakes_are_named(run: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


def test_amounts_are_told_in_units_of_their_size() -> None:
    for tell, amounts in (
        (_count, {0: "0.00", 999: "999.00", 1000: "1.00k", 7.62e9: "7.62B", 6.5e10: "65.00B"}),
        (_flops, {2.596e10: "25.96 GFLOP", 9.553e16: "95.53 PFLOP"}),
        (_size, {430_000: "0.41 MiB", 23.97e9: "22.32 GiB"}),
        (_duration, {0.0001: "0.10 ms", 9.82: "9.82 s", 90: "1.50 minutes", 304_128: "3.52 days"}),
    ):
        assert {amount: tell(amount) for amount in amounts} == amounts


def test_the_vocabulary_is_that_of_the_data_where_it_is_here(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shards, or of what would make them; the needle's ten digits and the specials."""
    tokenize(str(documents), tokenizer="bpe:300", out=tmp_path / "data", validation_fraction=0.2)
    monkeypatch.chdir(tmp_path)
    built = Tokenizer.load(tmp_path / "data/tokenizer").vocab_size
    prepare = "data.prepare={source: stdlib, tokenizer: 'bpe:4096', validation_fraction: 0.1}"
    for recipe, overrides, size in (
        ("demo", (), 259),
        ("demo", ("data.path=data",), built),
        ("demo", (prepare,), 4096),
        ("demo", ("model.vocab_size=77",), 77),
        ("needle_20_mdm", (), 13),
        ("toy_functions", (), 1024),
    ):
        model = _with_vocabulary(build(recipe, overrides))
        assert (model.vocab_size, model.mask_id >= 0) == (size, True)
    with pytest.raises(ValueError, match=r"of data that is not here: pass it, for example model\.vocab_size=50258, or"):
        _with_vocabulary(build("dit_small", ()))


def test_the_command_knows_the_table() -> None:
    assert {gpu.value for gpu in PlannedGpu} == GPUS.keys()
    assert all(math.isfinite(gpu.bandwidth(2, 8)) for gpu in GPUS.values())
