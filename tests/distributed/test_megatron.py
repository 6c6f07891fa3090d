"""Megatron on one, two and four processes computes what FSDP does alone, and reads and writes its checkpoints."""

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from model.losses import VocabularySlice, masked_linear_cross_entropy
from pretrain.checkpoint.load import resume
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Mesh, build_mesh, single_process
from pretrain.settings import validate
from pretrain.state import TrainState
from tests.distributed.parity import MDLM, SYSTEMS, backward, row_losses, whole_state

ROWS, STEPS, SKIPPED = 4, 20, 6

FP32, BF16 = TrainConfig(ema_decay=0.9), TrainConfig(precision="bf16")
PUBLISHED: tuple[tuple[str, TrainConfig], ...] = tuple(
    (system, settings) for system in ("mdlm", "vadd", "block_vmd", "cadd") for settings in (FP32, BF16)
)
CASES: tuple[tuple[str, TrainConfig], ...] = (
    *PUBLISHED,
    *((system, FP32) for system in ("untied", "prior", "all")),
    ("vadd", TrainConfig(freeze=(r"denoiser\..*\.[qk]\.weight", r"denoiser\.embed\.weight"))),
    ("all", TrainConfig(recompute="selective")),
    ("all", TrainConfig(recompute="full")),
)
"""All of them where matrices are divided; elsewhere the published systems."""
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
LAYOUTS = {2: {"tensor": (1, 1, 1, 2), "data": (1, 2, 1, 1)}, 4: {"tensor and data": (1, 2, 1, 2)}}
"""By number of processes, sizes of the axes: replicate, shard, context, tensor."""
Trace = list[tuple[float, float]]
Reference = dict[tuple[str, TrainConfig], tuple[Trace, list[float]]]
"""What FSDP alone has found: its trace, and the losses of held-out rows."""


def train(engine: Engine, system: str, steps: range = range(STEPS)) -> Trace:
    """Loss per position and gradient norm of every step, of which one is not taken."""
    trace: Trace = []
    for step in steps:
        loss = backward(engine, SYSTEMS[system], step, rows=ROWS)
        norm = engine.reduce_and_clip(1.0)
        take = torch.tensor(float(step != SKIPPED))
        engine.step(lr=1e-3, take=take)
        engine.update_ema(0.8, take=take)
        trace.append((loss, float(norm)))
    return trace


def averaged(engine: Engine, system: str) -> list[float]:
    """The loss of every row under the averaged weights, in order."""
    with engine.ema():
        return row_losses(engine, SYSTEMS[system], rows=ROWS)


def make(kind: str, mesh: Mesh, system: str, settings: TrainConfig) -> Engine:
    """An engine, Megatron's by the factory."""
    model = SYSTEMS[system]
    if kind == "fsdp":
        return FsdpEngine(model, OptimConfig(), settings, ParallelConfig(), mesh, seed=5)
    config = validate({"name": "parity", "seed": 5, "engine": kind, "data": {"kind": "shards", "path": ""}})
    return make_engine(replace(config, train=settings), model, mesh)


def same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> bool:
    """Whether two states are one, bit for bit."""
    return all(
        found[group].keys() == named.keys() and all(torch.equal(found[group][name], named[name]) for name in named)
        for group, named in wanted.items()
    )


def check_parity(mesh: Mesh, layout: str, reference: Reference) -> None:
    """Raises AssertionError where Megatron differs from FSDP alone."""
    for system, settings in CASES if layout == "tensor" else PUBLISHED:
        alone = make("fsdp", single_process(), system, settings)
        engine = make("megatron", mesh, system, settings)
        assert same(whole_state(engine), whole_state(alone)), f"{layout}, {system}: initial weights"
        assert engine.num_parameters == alone.num_parameters
        if (system, settings) not in reference:
            reference[system, settings] = train(alone, system), averaged(alone, system)
        check(engine, system, reference[system, settings], TOLERANCE[settings.precision], f"{layout}, {settings}")


def check_fsdp(mesh: Mesh, reference: Reference) -> None:
    """Here too, as it costs little beside the references: FSDP on these processes computes what it does alone."""
    for system, settings in PUBLISHED:
        engine = make("fsdp", mesh, system, settings)
        check(engine, system, reference[system, settings], TOLERANCE[settings.precision], f"fsdp, {settings}")


def check(engine: Engine, system: str, wanted: tuple[Trace, list[float]], tolerance: float, case: str) -> None:
    """Raises AssertionError where training on this engine's processes shows."""
    trace, rows = wanted
    for step, (ours, theirs) in enumerate(zip(train(engine, system), trace, strict=True)):
        assert ours == pytest.approx(theirs, rel=tolerance), f"{case}, {system}: step {step}"
    assert averaged(engine, system) == pytest.approx(rows, rel=10 * tolerance), f"{case}, {system}"


def check_replicated_gradients(mesh: Mesh) -> None:
    """What is not divided has the same gradient on both tensor processes, bit for bit."""
    engine = make("megatron", mesh, "all", TrainConfig())
    backward(engine, SYSTEMS["all"], 0, rows=ROWS)
    replicated, canonical = 0, engine.state_dict()["model"]
    for name, parameter in engine.parameters.items():  # type: ignore[attr-defined]
        if parameter.shape == canonical[name].shape and parameter.grad is not None:
            both = [torch.empty_like(parameter.grad) for _ in range(2)]
            dist.all_gather(both, parameter.grad)
            assert torch.equal(*both), name
            replicated += 1
    assert replicated > 20


def check_poison(mesh: Mesh, layout: str) -> None:
    """A gradient that is not finite on one process is the norm of both, and the step changes nothing."""
    engine = make("megatron", mesh, "cadd", TrainConfig(ema_decay=0.9))
    train(engine, "cadd", range(2))
    before = whole_state(engine)
    poison = float("nan") if dist.get_rank() == 1 else 1.0
    backward(engine, SYSTEMS["cadd"], 2, rows=ROWS, factor=poison)
    norm = engine.reduce_and_clip(1.0)
    assert not torch.isfinite(norm), layout
    take = torch.isfinite(norm).float()
    engine.step(lr=1e-2, take=take)
    engine.update_ema(0.9, take=take)
    assert same(whole_state(engine), before), layout


def check_cross_entropy() -> None:
    """Megatron's head and cross-entropy in chunks against ours on the whole vocabulary."""
    from pretrain.parallel.megatron_loss import vocab_parallel_linear_cross_entropy

    generator, rank = torch.Generator().manual_seed(0), dist.get_rank()
    for total in (24, 21, 3):
        hidden = torch.randn(29, 8, generator=generator).requires_grad_()
        head = torch.randn(total, 8, generator=generator).requires_grad_()
        weight = torch.rand(29, generator=generator)
        weight[-4:] = 0.0
        mine = slice(rank * -(-total // 2), (rank + 1) * -(-total // 2))
        for forbidden in (0, total // 2, total - 1):
            targets = torch.arange(29) % total
            targets[:25][targets[:25] == forbidden] = (forbidden + 1) % total
            expected, expected_M = masked_linear_cross_entropy(hidden, head, targets, weight, forbidden=forbidden)
            wanted = torch.autograd.grad(3.0 * expected, (hidden, head))
            for chunk_bytes in (1, 500, 2**20):
                local = head.detach()[mine].clone().requires_grad_()
                loss, ce_M = vocab_parallel_linear_cross_entropy(
                    hidden,
                    local,
                    targets,
                    weight,
                    forbidden=forbidden,
                    part=VocabularySlice(dist.group.WORLD, mine.start, total),  # type: ignore[arg-type]
                    chunk_bytes=chunk_bytes,
                )
                found = torch.autograd.grad(3.0 * loss, (hidden, local))
                torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(ce_M, expected_M, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found[1], wanted[1][mine], rtol=1e-5, atol=1e-5)


def check_journey(mesh: Mesh, folder: Path) -> None:
    """FSDP alone, then Megatron on two processes, then FSDP alone again: one trace, as if nothing had happened."""
    model, settings = SYSTEMS["all"], TrainConfig(ema_decay=0.9)
    wanted = train(make("fsdp", single_process(), "all", settings), "all", range(12))
    alone = make("fsdp", single_process(), "all", settings)
    trace = train(alone, "all", range(4))
    if dist.get_rank() == 0:
        save(alone, 4, folder)
    dist.barrier()
    divided = make("megatron", mesh, "all", settings)
    resume(folder / "step-00000004", divided, model, {})
    trace += train(divided, "all", range(4, 8))
    save(divided, 8, folder)
    alone = make("fsdp", single_process(), "all", settings)
    resume(folder / "step-00000008", alone, model, {})
    assert same(whole_state(alone), whole_state(divided))
    trace += train(alone, "all", range(8, 12))
    for step, (ours, theirs) in enumerate(zip(trace, wanted, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4), f"step {step} of the journey"


def save(engine: Engine, step: int, folder: Path) -> None:
    """A sealed checkpoint; steps after SKIPPED count one update less."""
    state = TrainState(step=step, skipped=int(step > SKIPPED))
    model = SYSTEMS["all"]
    save_checkpoint(folder, engine.state_dict(), state, model, engine.mesh.world, save_tokenizer=None, keep=9)


def run_alone(_rank: int) -> None:
    """Every case on one process, which starts its own group."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    check_parity(single_process(), "alone", {})
    dist.destroy_process_group()


def run_rank(rank: int, world: int, rendezvous: str, folder: Path) -> None:
    """Every case on two or four processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    meshes = {name: build_mesh(torch.device("cpu"), shape) for name, shape in LAYOUTS[world].items()}
    if world == 2:
        check_replicated_gradients(meshes["tensor"])
        check_cross_entropy()
        check_journey(meshes["tensor"], folder)
    reference: Reference = {}
    for layout, mesh in meshes.items():
        check_poison(mesh, layout)
        check_parity(mesh, layout, reference)
    if world == 2:
        check_fsdp(meshes["data"], reference)
    dist.destroy_process_group()


@pytest.mark.slow
def test_one_process_computes_what_fsdp_does() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(run_alone, nprocs=1)


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_several_processes_compute_what_fsdp_does_alone(world: int, tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(run_rank, args=(world, str(tmp_path / "rendezvous"), tmp_path / "checkpoints"), nprocs=world)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("parallel.replicate=2", "parallel.replicate=1"),
        ("parallel.context=2", "parallel.context=1"),
        ("parallel.offload=true", "parallel.offload=false"),
        ("train.compile=true", "train.compile=false"),
    ],
)
def test_what_megatron_has_not_is_refused(override: str, fix: str) -> None:
    tree = {"name": "refused", "data": {"kind": "shards", "path": ""}}
    assert validate(tree, [override]).engine == "fsdp"
    with pytest.raises(ValueError, match=f"does not go with engine=megatron: set {fix}, or engine=fsdp"):
        validate(tree, [override, "engine=megatron"])


def test_without_the_package_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.startswith("megatron.")]  # by another test of this process
    for name in ("megatron", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pretrain.engines.megatron", raising=False)
    for name in [name for name in sys.modules if "pretrain.parallel.megatron_" in name]:
        monkeypatch.delitem(sys.modules, name)
    config = validate({"name": "missing", "engine": "megatron", "data": {"kind": "shards", "path": ""}})
    with pytest.raises(ValueError, match=r"pip install penumbra-diffusion\[megatron\], or engine=fsdp"):
        make_engine(config, MDLM, single_process())


def test_a_process_without_tokens_is_refused() -> None:
    from pretrain.parallel.megatron_layers import refuse_empty_parts

    refuse_empty_parts(replace(MDLM, vocab_size=5, mask_id=4), 3)
    with pytest.raises(ValueError, match=r"parallel\.tensor=4 leaves a process without .* use one of \[1, 2, 3, 5\]"):
        refuse_empty_parts(replace(MDLM, vocab_size=5, mask_id=4), 4)
