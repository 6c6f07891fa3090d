"""The loop: what a run computes does not depend on how it is cut up, and it keeps its books right."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.packing import ShardSource
from model.batch import Batch
from model.corruption import corrupt_uniform_count
from model.diffusion import LossTerms, StepSchedule
from model.flops import training_flops
from model.masks import MaskSpec
from model.noise import NoiseKey
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation
from pretrain.config import RunConfig
from pretrain.data import open_data
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.parallel.mesh import Axis, single_process
from pretrain.schedules import learning_rate
from pretrain.settings import dump_config, load_config
from pretrain.train import resolve, train
from pretrain.trainer import Trainer, corrupt_step, validation_bound

MakeConfig = Callable[..., RunConfig]
Trace = dict[int, dict[str, Any]]
ReadTrace = Callable[[Path], Trace]
LINE_KEYS = {"train.loss", "train.ce", "train.grad_norm", "train.lr", "train.tokens", "train.skipped", "train.step"}


@contextmanager
def recorded_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, tuple[float, list[int]]]]:
    """By global sample index: t, and what the model saw."""
    seen: dict[int, tuple[float, list[int]]] = {}
    forward_backward = FsdpEngine.forward_backward

    def recording(engine: FsdpEngine, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        noise = micro.corruption
        for row, index in enumerate(micro.batch.index_B.tolist()):
            assert index not in seen
            seen[index] = (float(noise.t_BS[:, 0][row]), noise.x_t_BL[row].tolist())
        return forward_backward(engine, micro, scale=scale, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(FsdpEngine, "forward_backward", recording)
        yield seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> RunConfig:
    """A run from its first step to its last."""
    config = make_config(tmp_path_factory.mktemp("runs") / "undisturbed")
    train(config)
    return config


def tensors_of(config: RunConfig) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in load_for_evaluation(config.path).model.named_parameters()}


def test_a_run_learns_and_repeats_itself(tmp_path: Path, undisturbed: RunConfig, trace: ReadTrace) -> None:
    first = trace(undisturbed.path)
    assert sorted(first) == list(range(1, 13))
    assert all(line.keys() >= LINE_KEYS for line in first.values())
    assert first[12]["validation.nelbo"] < first[6]["validation.nelbo"] < math.log(259)
    train(load_config(undisturbed.path / "config.yaml", [f"folder={tmp_path / 'again'}"]))
    assert trace(tmp_path / "again") == first


@pytest.mark.parametrize("micro_tokens", [32, 96, 256, 4096])
def test_micro_batches_change_nothing(
    tmp_path: Path,
    make_config: MakeConfig,
    undisturbed: RunConfig,
    trace: ReadTrace,
    monkeypatch: pytest.MonkeyPatch,
    micro_tokens: int,
) -> None:
    overrides = ["validation.every=0", "checkpoint.every=0"]
    with recorded_noise(monkeypatch) as whole:
        train(make_config(tmp_path / "whole", *overrides))
    with recorded_noise(monkeypatch) as split:
        train(make_config(tmp_path / "split", *overrides, f"train.micro_batch_tokens={micro_tokens}"))
    assert sorted(whole) == list(range(12 * 16))
    assert split == whole
    ours, theirs = trace(tmp_path / "split"), trace(undisturbed.path)
    for step in theirs:
        assert ours[step]["train.loss"] == pytest.approx(theirs[step]["train.loss"], rel=1e-6)
        assert ours[step]["train.grad_norm"] == pytest.approx(theirs[step]["train.grad_norm"], rel=1e-5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(
    tmp_path: Path, make_config: MakeConfig, undisturbed: RunConfig, trace: ReadTrace, num_workers: int
) -> None:
    train(make_config(tmp_path / "run", f"data.num_workers={num_workers}"))
    assert trace(tmp_path / "run") == trace(undisturbed.path)


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("micro_tokens", ["null", "128"])
def test_a_resumed_run_goes_on_bit_for_bit(
    tmp_path: Path, undisturbed: RunConfig, trace: ReadTrace, step: int, micro_tokens: str
) -> None:
    started = undisturbed
    if micro_tokens != "null":
        settings = [f"train.micro_batch_tokens={micro_tokens}", f"folder={tmp_path / 'split'}"]
        started = load_config(undisturbed.path / "config.yaml", settings)
        train(started)
    name = f"step-{step:08d}"
    shutil.copytree(started.path / CHECKPOINTS / name, tmp_path / "run" / CHECKPOINTS / name)
    train(load_config(started.path / "config.yaml", [f"folder={tmp_path / 'run'}"]))
    expected = trace(started.path)
    assert trace(tmp_path / "run") == {n: line for n, line in expected.items() if n > step}
    ours = load_for_evaluation(tmp_path / "run")
    for named, parameter in load_for_evaluation(started.path).model.named_parameters():
        assert torch.equal(parameter, dict(ours.model.named_parameters())[named])
    assert ours.state.resumes == 1
    assert ours.state.step == 12


LATENT = ("model.latent.dim=3", "model.backbone.condition_dim=8", "train.kl_anneal_steps=6")
SWITCHES = {
    "latent": LATENT,
    "block_latent": (*LATENT, "model.block_size=8", "model.latent.prior=earlier_blocks"),
    "hints": ("model.augmentation.mse_weight=0.5",),
    "autoregressive": ("model.autoregressive=true",),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_with_any_switch_a_run_is_the_same_in_pieces(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, name: str
) -> None:
    """Cut into micro-batches to rounding, resumed bit for bit."""
    settings = ("train.steps=8", "validation.every=4", *SWITCHES[name])
    train(make_config(tmp_path / "whole", *settings))
    train(make_config(tmp_path / "split", *settings, "train.micro_batch_tokens=96"))
    whole, split = trace(tmp_path / "whole"), trace(tmp_path / "split")
    for step, line in whole.items():
        for key in ("train.loss", "train.ce", "train.grad_norm", *(k for k in ("train.kl",) if k in line)):
            assert split[step][key] == pytest.approx(line[key], rel=1e-5), (step, key)
    half = f"{CHECKPOINTS}/step-00000004"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "resumed" / half)
    train(make_config(tmp_path / "resumed", *settings))
    assert trace(tmp_path / "resumed") == {step: line for step, line in whole.items() if step > 4}


def test_lines_of_a_run_with_a_latent_say_what_it_says(tmp_path: Path, make_config: MakeConfig) -> None:
    train(make_config(tmp_path / "run", *LATENT, "train.steps=7", "log.every=3", "validation.every=7"))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    told = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in told] == [3, 6, 7]
    for line in told:
        assert line["kl"] > 0
        assert 0 <= line["active_units"] <= 3
        assert line["mutual_information"] <= math.log(16)
        assert "latent" not in line
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert validation["bound"] == "delbo"
    assert 0 < validation["delbo_error"] < validation["delbo"]


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(
    tmp_path: Path, undisturbed: RunConfig, trace: ReadTrace
) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "run")
    config = load_config(undisturbed.path / "config.yaml", [f"folder={tmp_path / 'run'}", "optim.schedule=constant"])
    train(config)
    assert trace(config.path) == trace(undisturbed.path)
    train(load_config(config.path / "config.yaml", ["train.steps=14"]))
    assert sorted(trace(config.path)) == list(range(1, 15))


def test_the_books_are_kept(undisturbed: RunConfig, trace: ReadTrace) -> None:
    lines = trace(undisturbed.path)
    for step, line in lines.items():
        assert line["train.tokens"] == step * 512
        assert line["train.lr"] == learning_rate(step - 1, undisturbed.optim, 12)
        assert line["train.skipped"] == 0
    assert [step for step, line in lines.items() if "validation.nelbo" in line] == [6, 12]
    events = [r for r in read_metrics(undisturbed.path / "metrics.jsonl") if r["kind"] == "event"]
    assert [(e["event"], e["step"]) for e in events] == [
        ("start", 0),
        *(("checkpoint", step) for step in (4, 8, 12)),
        ("finish", 12),
    ]
    state = load_for_evaluation(undisturbed.path).state
    assert (state.step, state.tokens, state.skipped, state.resumes) == (12, 12 * 512, 0, 0)
    assert dump_config(undisturbed) == (undisturbed.path / "config.yaml").read_text()


def test_the_logged_loss_is_the_sum_over_the_global_count(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", "train.steps=1", "model.backbone.dropout=0")
    data = open_data(config.data, single_process().world)
    model = config.model.with_vocabulary(data.tokenizer.vocab_size, data.tokenizer.mask_id)
    engine = FsdpEngine(model, config.optim, config.train, config.parallel, single_process(), seed=config.seed)
    trainer = Trainer(config, model, engine, data, hooks=[])
    micro = next(iter(trainer._batches()))
    noise, batch = micro.corruption, micro.batch
    ce_BL = cross_entropy(engine, batch, noise.x_t_BL)
    weighted = (ce_BL * noise.masked_BL / noise.t_BS[:, 0][:, None]).double().sum() / batch.maskable_BL.sum()
    masked = ce_BL[noise.masked_BL].double().mean()
    train(config)
    (line,) = [r for r in read_metrics(config.path / "metrics.jsonl") if r["kind"] == "train"]
    assert line["loss"] == pytest.approx(float(weighted), rel=1e-5)
    assert line["ce"] == pytest.approx(float(masked), rel=1e-5)


def cross_entropy(engine: FsdpEngine, batch: Batch, x_t_BL: Tensor) -> Tensor:
    """Nats at every position, from all logits."""
    mask = MaskSpec(document_BL=batch.document_BL)
    with torch.no_grad():
        hidden_BLD = engine.model.denoise(x_t_BL, positions=batch.positions_BL, mask=mask)
        logits_NV = engine.model.logits(hidden_BLD.flatten(0, 1))
    chosen_N1 = batch.tokens_BL.flatten()[:, None]
    return -logits_NV.log_softmax(-1).gather(-1, chosen_N1).view(batch.tokens_BL.shape)


def test_a_poisoned_step_is_skipped_counted_and_survives_a_resume(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce_and_clip = FsdpEngine.reduce_and_clip

    def run(folder: Path, first: int) -> None:
        steps = iter(range(first, 100))

        def poisoned(engine: FsdpEngine, max_norm: float) -> Tensor:
            if next(steps) in (2, 6):
                gradient = next(iter(engine.parameters.values())).grad
                assert gradient is not None
                gradient[0, 0] = torch.nan
            return reduce_and_clip(engine, max_norm)

        with monkeypatch.context() as patch:
            patch.setattr(FsdpEngine, "reduce_and_clip", poisoned)
            train(make_config(folder, "log.every=2"))

    run(tmp_path / "whole", 0)
    lines = trace(tmp_path / "whole")
    assert {n: line["train.skipped"] for n, line in lines.items()} == {2: 0, 4: 1, 6: 1, 8: 2, 10: 2, 12: 2}
    assert load_for_evaluation(tmp_path / "whole").state.skipped == 2
    assert math.isfinite(lines[12]["train.loss"])
    name = "step-00000004"
    shutil.copytree(tmp_path / "whole" / CHECKPOINTS / name, tmp_path / "part" / CHECKPOINTS / name)
    run(tmp_path / "part", 4)
    assert trace(tmp_path / "part") == {n: line for n, line in lines.items() if n > 4}


def test_speed_is_counted_over_the_steps_of_a_line(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(tmp_path / "run", "log.every=5"))
    lines = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] < 1
    config = make_config(tmp_path / "run").model.with_vocabulary(259, 256)
    whole = training_flops(config, num_sequences=16, length=32, num_rows=300)
    split = [training_flops(config, num_sequences=4, length=32, num_rows=75) for _ in range(4)]
    assert whole == sum(split)


@pytest.mark.parametrize("size", [3, 5, 32])
def test_a_batch_that_does_not_divide_is_refused(make_config: MakeConfig, tmp_path: Path, size: int) -> None:
    config = make_config(tmp_path / "run")
    data = open_data(config.data, single_process().world)
    model = config.model.with_vocabulary(data.tokenizer.vocab_size, data.tokenizer.mask_id)
    engine = FsdpEngine(model, config.optim, config.train, config.parallel, single_process(), seed=0)
    engine.mesh = replace(single_process(), data=Axis(rank=0, size=size), world=Axis(rank=0, size=size))
    with pytest.raises(ValueError, match=rf"16 rows .* {size} processes: use one of \[1, 2, 4, 8, 16\] processes"):
        Trainer(config, model, engine, data, hooks=[])
    engine.mesh = replace(engine.mesh, world=Axis(rank=0, size=4 * size))
    among = rf"{4 * size} processes, 4 of which share a row: use one of \[4, 8, 16, 32, 64\] processes"
    with pytest.raises(ValueError, match=among):
        Trainer(config, model, engine, data, hooks=[])
    config = make_config(tmp_path / "run", "parallel.replicate=8")
    with pytest.raises(ValueError, match=rf"{4 * size} processes, 4 of which share a row: use one of \[32, 64\] proc"):
        Trainer(config, model, engine, data, hooks=[])
    assert not config.path.exists()


def test_the_validation_bound_does_not_depend_on_how_the_rows_are_cut(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    data = open_data(config.data, single_process().world)
    model = config.model.with_vocabulary(data.tokenizer.vocab_size, data.tokenizer.mask_id)
    engine = FsdpEngine(model, config.optim, config.train, config.parallel, single_process(), seed=0)
    for key in ("micro_batch_tokens=32", "micro_batch_tokens=96", "batch_tokens=1024", "batch_tokens=96"):
        other = make_config(tmp_path / "run", f"train.{key}")
        found, first = (validation_bound(engine, data, model, each) for each in (other, config))
        assert found.tokens == first.tokens == 7 * 32
        assert found.value == pytest.approx(first.value, rel=1e-6)
        assert found.error == pytest.approx(first.error, rel=1e-4)
    source = data.validation
    assert source is not None
    total = 0.0
    for row in range(7):
        index = torch.tensor([row])
        batch = Batch.of({**source.gather(index.numpy()), "index": index})
        noise = corrupt_uniform_count(batch, NoiseKey(config.seed, 0, index), model)
        (ce_L,) = cross_entropy(engine, batch, noise.x_t_BL)
        num_masked = int(noise.masked_BL.sum())
        total += float(ce_L[noise.masked_BL[0]].sum()) * 32 / num_masked
    assert (first.kind, first.tokens) == ("nelbo", 7 * 32)
    assert first.value == pytest.approx(total / (7 * 32), rel=1e-5)


def test_without_held_out_rows_there_is_no_bound(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(tmp_path / "run", "validation.every=0", "train.steps=2"))
    assert not [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "validation"]


def test_micros_are_a_function_of_the_step_and_the_rows(make_config: MakeConfig, tmp_path: Path, shards: Path) -> None:
    model = make_config(tmp_path / "run").model.with_vocabulary(259, 256)
    source = ShardSource(shards, "train", 32)
    index = torch.arange(12)
    rows = {**source.gather(index.numpy()), "index": index}
    schedule = partial(StepSchedule, statistics=True)
    whole = corrupt_step(3, rows, model=model, seed=0, schedule=schedule)
    parts = whole.split(5)
    assert [p.batch.num_sequences for p in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([p.corruption.x_t_BL for p in parts]), whole.corruption.x_t_BL)
    assert torch.equal(torch.cat([p.corruption.t_BS[:, 0] for p in parts]), whole.corruption.t_BS[:, 0])
    assert {part.step for part in (whole, *parts)} == {StepSchedule(kl_weight=3, statistics=True)}
    other = corrupt_step(4, rows, model=model, seed=0, schedule=schedule)
    assert not torch.equal(other.corruption.x_t_BL, whole.corruption.x_t_BL)


@pytest.mark.parametrize(
    ("override", "named"), [("seed=7", "seed is 0 there and 7 here"), ("train.batch_tokens=1024", "train.batch_tokens")]
)
def test_a_checkpoint_of_a_run_with_other_noise_or_order_is_refused(
    make_config: MakeConfig, tmp_path: Path, override: str, named: str
) -> None:
    train(make_config(tmp_path / "run", "train.steps=4"))
    with pytest.raises(ValueError, match=rf"another run .*{named}"):
        train(make_config(tmp_path / "run", "train.steps=8", override))


def test_shards_that_were_made_otherwise_are_not_taken_for_the_wanted_ones(
    make_config: MakeConfig, tmp_path: Path, documents: Path
) -> None:
    wanted = ("data.prepare.validation_fraction=0.2", "data.prepare.tokenizer=bytes")
    train(make_config(tmp_path / "run", "train.steps=1", f"data.prepare.source={documents}", *wanted))
    with pytest.raises(ValueError, match=r"was made from .*data.prepare=null"):
        train(make_config(tmp_path / "other", "train.steps=1", "data.prepare.source=stdlib", *wanted))


def test_a_run_folder_names_its_configuration(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", "train.steps=1")
    train(config)
    assert resolve(str(tmp_path / "run"), []) == config
