"""DeepSpeed's ZeRO trains as a single process does: losses, gradient norms, skipped steps, averages, checkpoints."""

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from model.config import AugmentationConfig, ModelConfig, RecognitionConfig
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines import zero_setup
from pretrain.engines.base import Engine, Tensors
from pretrain.engines.deepspeed import DeepSpeedEngine
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Mesh, build_mesh, single_process
from tests.distributed.parity import LATENT, MDLM, VADD, backward, row_losses, whole_state

ROWS, STEPS, HALF = 16, 20, 10
SKIPPED, BROKEN, SPECK = 7, 12, 15
"""Steps whose update is skipped: one that could have been taken, and two in which the last process's share of the
gradient is not a number: all of it, or one element, which lies in the last process's partition."""
NOT_FINITE = (BROKEN, SPECK)

UNEVEN = replace(LATENT, dim=3)
SYSTEMS = {
    "mdlm": MDLM,
    "vadd": replace(VADD, latent=UNEVEN),
    "block_vmd": replace(
        VADD, block_size=4, latent=replace(UNEVEN, recognition=RecognitionConfig(num_layers=1, marks="added"))
    ),
    "cadd": replace(
        MDLM,
        backbone=replace(MDLM.backbone, tie_embeddings=True, ffn="swiglu", norm="rmsnorm"),
        augmentation=AugmentationConfig(fusion="concat", gated=True, mse_weight=0.1),
    ),
}
MOVING = "vadd"
TRAIN = TrainConfig(ema_decay=0.8)
BF16 = replace(TRAIN, precision="bf16")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""To a plain module in float32; in bfloat16 to FSDP on the same processes, which computes with rounded copies too."""
ALONE = single_process()
FROZEN = (r"denoiser\.blocks\.0\..*", r"denoiser\.embed\.weight")
WITHOUT_KEEPING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""With these, stage 3 lets go of what it has gathered at once, as it does with parameters that are not tiny."""


@dataclass(frozen=True)
class Case:
    """A system under ZeRO."""

    system: str
    stage: int
    train: TrainConfig = TRAIN
    offload: bool = False
    keeping: bool = False


def cases(world: int) -> Iterator[Case]:
    """Two processes train every system at every stage; one process every stage, and what two have not tried."""
    for number, system in enumerate(SYSTEMS):
        for stage in (1, 2) if world > 1 else (1 + number % 2,):
            yield Case(system, stage)
        yield Case(system, 3, keeping=(world == 1) == (system in ("vadd", "cadd")))
    if world > 1:
        yield Case("mdlm", 1, BF16)
        yield Case("vadd", 2, BF16)
        yield Case("block_vmd", 2, BF16, offload=True)
        yield Case("cadd", 3, BF16, keeping=True)
        yield Case("mdlm", 3, replace(TRAIN, freeze=FROZEN), offload=True)
        yield Case("cadd", 3, replace(TRAIN, recompute="selective"), keeping=True)
    else:
        yield Case("block_vmd", 3, BF16, keeping=True)
        yield Case("mdlm", 1, replace(BF16, freeze=FROZEN), offload=True)
        yield Case("mdlm", 3, replace(TRAIN, recompute="full"), keeping=True)


@dataclass
class Record:
    """Loss per position and gradient norm of every step, losses of held-out rows, the state at HALF and at the end."""

    trace: list[tuple[float, float]] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)
    current: list[float] = field(default_factory=list)
    half: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    end: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def train(engine: Engine, model: ModelConfig, steps: Sequence[int]) -> list[tuple[float, float]]:
    """Loss per position and gradient norm of every step."""
    trace = []
    for step in steps:
        parts = 2 if step % 2 == 0 else 1
        axis, by_speck = engine.mesh.data, step == SPECK and isinstance(engine, DeepSpeedEngine)
        poisoned = step in NOT_FINITE and not by_speck and axis.rank == axis.size - 1
        with speck(engine) if by_speck else nullcontext():
            factor = float("nan") if poisoned else 1.0
            loss = backward(engine, model, step, rows=ROWS, parts=parts, factor=factor)
        norm = engine.reduce_and_clip(0.5)
        assert axis.all_reduce([float(norm)]) == pytest.approx([axis.size * float(norm)], rel=0, abs=0, nan_ok=True)
        take = torch.isfinite(norm).float() * (step != SKIPPED)
        engine.step(lr=1e-3, take=take)
        engine.update_ema(0.8, take=take)
        trace.append((loss, float(norm)))
        assert bool(torch.isfinite(norm)) == (step not in NOT_FINITE)
    return trace


@contextmanager
def speck(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within it the last process's part of a gradient ends with what is not a number; other processes' is as ever."""
    name = [name for name in engine.named.fragments if len(engine.named.shapes[name]) >= 2][-1]

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[-1, -1] = torch.nan
        return spoiled

    last = engine.mesh.data.rank == engine.mesh.data.size - 1
    hook = engine.parameters[name].register_hook(spoil) if last else None
    yield
    if hook is not None:
        hook.remove()


def evaluated(engine: Engine, model: ModelConfig, *, averaged: bool) -> list[float]:
    """The loss of every row, gathered in order."""
    with engine.ema() if averaged else nullcontext():
        return row_losses(engine, model, rows=ROWS)


def record(engine: Engine, model: ModelConfig) -> Record:
    """Trains from the beginning to the end."""
    found = Record(train(engine, model, range(HALF)))
    if engine.mesh is ALONE:
        found.half = whole_state(engine)
    found.trace += train(engine, model, range(HALF, STEPS))
    found.averaged = evaluated(engine, model, averaged=True)
    found.current = evaluated(engine, model, averaged=False)
    found.end = whole_state(engine)
    return found


@cache
def reference(system: str, settings: TrainConfig, mesh: Mesh) -> Record:
    """What FSDP's engine finds, which recomputes nothing."""
    model, settings = SYSTEMS[system], replace(settings, recompute="none")
    return record(FsdpEngine(model, OptimConfig(), settings, ParallelConfig(), mesh, seed=5), model)


def deepspeed_engine(case: Case, mesh: Mesh) -> DeepSpeedEngine:
    """The engine under test."""
    zero_setup.GATHERING = {} if case.keeping else WITHOUT_KEEPING
    parallel = ParallelConfig(zero_stage=case.stage, offload=case.offload)  # type: ignore[arg-type]
    return DeepSpeedEngine(SYSTEMS[case.system], OptimConfig(), case.train, parallel, mesh, seed=5)


def check(found: Record, wanted: Record, case: Case) -> None:
    """Raises AssertionError where the engine shows."""
    tolerance = TOLERANCE[case.train.precision]
    for step, (ours, theirs) in enumerate(zip(found.trace, wanted.trace, strict=True)):
        assert ours[0] == pytest.approx(theirs[0], rel=tolerance), f"{case}: loss of step {step}"
        if step not in NOT_FINITE:
            assert ours[1] == pytest.approx(theirs[1], rel=tolerance), f"{case}: norm of step {step}"
    assert found.averaged == pytest.approx(wanted.averaged, rel=tolerance, abs=tolerance), f"{case}: averages"
    assert found.current == pytest.approx(wanted.current, rel=tolerance, abs=tolerance), f"{case}: evaluation"
    assert found.averaged != pytest.approx(found.current, rel=1e-4), f"{case}: averages and weights are one"
    assert found.end.keys() == wanted.end.keys()
    for group, named in wanted.end.items():
        assert found.end[group].keys() == named.keys(), f"{case}: {group}"
    if case.train.precision == "fp32":
        same(found.end, wanted.end, str(case))
    for name, weight in found.end["model"].items():
        if case.train.freeze and name not in found.end["exp_avg"]:
            assert torch.equal(weight, wanted.end["model"][name]), f"{case}: {name} is frozen"


def same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]], case: str) -> None:
    """Raises AssertionError where tensors differ by more than a sum in another order does."""
    for group, named in wanted.items():
        for name, tensor in named.items():
            difference = float((found[group][name] - tensor).abs().max()) / max(1e-12, float(tensor.abs().max()))
            assert difference < 1e-3, f"{case}: {group} of {name} differs by {difference}"


def check_round_trip(case: Case, mesh: Mesh) -> None:
    """A run that changes to DeepSpeed at half and back at the end goes on as if nothing had happened."""
    model, wanted = SYSTEMS[case.system], reference(case.system, case.train, ALONE)
    engine = deepspeed_engine(case, mesh)
    engine.load_state_dict(divided(wanted.half, mesh), num_updates=HALF - 1)
    loaded = whole_state(engine)
    for group, named in wanted.half.items():
        for name, tensor in named.items():
            assert torch.equal(loaded[group][name], tensor), f"{case}: {group} of {name}"
    phases: list[str] = []
    engine.span = lambda phase: nullcontext(phases.append(phase))
    trace = train(engine, model, range(HALF, STEPS))
    assert phases == ["forward", "backward"] * (len(phases) // 2)
    assert len(phases) >= 2 * (STEPS - HALF)
    for ours, theirs in zip(trace, wanted.trace[HALF:], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-4), f"{case}: half-way"
    back = FsdpEngine(model, OptimConfig(), case.train, ParallelConfig(), ALONE, seed=6)
    back.load_state_dict(whole_state(engine), num_updates=STEPS - 1 - len(NOT_FINITE))
    same(whole_state(back), wanted.end, f"{case}: back")
    straight = FsdpEngine(model, OptimConfig(), case.train, ParallelConfig(), ALONE, seed=7)
    straight.load_state_dict(copy.deepcopy(wanted.end), num_updates=STEPS - 1 - len(NOT_FINITE))
    later = range(STEPS, STEPS + 3)
    for ours, theirs in zip(train(back, model, later), train(straight, model, later), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), f"{case}: after the return"


def divided(tensors: Tensors, mesh: Mesh) -> Tensors:
    """Whole tensors as an engine on this mesh takes them."""
    if mesh.devices is None:
        return tensors
    devices = mesh.devices["weights"]
    return {
        group: {name: distribute_tensor(tensor, devices, [Shard(0)]) for name, tensor in named.items()}
        for group, named in tensors.items()
    }


def save_at_half(folder: Path, mesh: Mesh) -> None:
    """Checkpoints of FSDP and of every stage, after HALF steps on this mesh."""
    model = SYSTEMS[MOVING]
    fsdp = FsdpEngine(model, OptimConfig(), TRAIN, ParallelConfig(), mesh, seed=5)
    stages = {f"stage{stage}": deepspeed_engine(Case(MOVING, stage), mesh) for stage in (1, 2, 3)}
    for name, engine in {"fsdp": fsdp, **stages}.items():
        train(engine, model, range(HALF))
        dcp.save(engine.state_dict(), checkpoint_id=folder / name)


def check_moved(folder: Path, mesh: Mesh) -> None:
    """FSDP's checkpoint goes on under every stage, and those of every stage under FSDP, on another mesh."""
    model, wanted = SYSTEMS[MOVING], reference(MOVING, TRAIN, ALONE).trace[HALF:]
    for stage in (1, 2, 3):
        fsdp = FsdpEngine(model, OptimConfig(), TRAIN, ParallelConfig(), mesh, seed=6)
        for name, engine in (("fsdp", deepspeed_engine(Case(MOVING, stage), mesh)), (f"stage{stage}", fsdp)):
            tensors = engine.state_dict()
            dcp.load(tensors, checkpoint_id=folder / name, no_dist=True)
            engine.load_state_dict(tensors, num_updates=HALF - 1)
            for ours, theirs in zip(train(engine, model, range(HALF, STEPS)), wanted, strict=True):
                assert ours[0] == pytest.approx(theirs[0], rel=1e-4), f"from {name}, stage {stage}"


def run_rank(rank: int, world: int, folder: str) -> None:
    """Every case on this process."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    else:
        zero_setup.import_deepspeed(ALONE.device)  # sets up a group of one
    sharded = build_mesh(ALONE.device, (1, world, 1, 1))
    mesh = ALONE if world == 1 else sharded
    for case in cases(world):
        wanted = reference(case.system, case.train, sharded if case.train.precision == "bf16" else ALONE)
        check(record(deepspeed_engine(case, mesh), SYSTEMS[case.system]), wanted, case)
    check_round_trip(Case(MOVING, stage=1 + world), mesh)
    (save_at_half if world > 1 else check_moved)(Path(folder), mesh)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_trains_as_one_process_does(tmp_path: Path) -> None:
    """One test, because the single process goes on from what the two have saved."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for world in (2, 1):
        mp.spawn(run_rank, args=(world, str(tmp_path)), nprocs=world)


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"^engine=deepspeed needs .* pip install penumbra-diffusion\[deepspeed\]"):
        deepspeed_engine(Case("mdlm", 3), single_process())
