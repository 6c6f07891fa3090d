"""Four processes in every layout compute what one computes: losses, gradient norms, and the weights at the end."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Mesh, build_mesh, single_process
from tests.distributed.parity import LENGTH, SYSTEMS, backward, micros, row_losses, whole

pytestmark = pytest.mark.slow

WORLD, ROWS, STEPS, MANY = 4, 8, 5, 20
LAYOUTS = {
    "sharded": (1, 4, 1, 1),
    "replicated": (4, 1, 1, 1),
    "hybrid": (2, 2, 1, 1),
    "tensor": (1, 2, 1, 2),
    "replicated_tensor": (2, 1, 1, 2),
    "context": (1, 2, 2, 1),
    "context_tensor": (1, 1, 2, 2),
}
"""Sizes of the axes: replicate, shard, context, tensor."""
FEW = ("mdlm", "block_vmd", "cadd", "all")
COVERED = {
    "tensor": tuple(SYSTEMS),
    "context_tensor": tuple(SYSTEMS),
    "sharded": (*FEW, "vadd", "prior", "untied"),
    "hybrid": ("all",),
}
"""Systems of a layout, where they are others than those few."""
PUBLISHED = ("mdlm", "vadd", "block_vmd", "cadd")
LONG = tuple((system, TrainConfig(precision=p)) for system in PUBLISHED for p in ("fp32", "bf16"))
"""Trained for MANY steps by two shards of two replicas each."""
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
Trace = list[tuple[float, float]]
Case = tuple[str, TrainConfig, int]
"""A system, how it is trained, and for how many steps."""
Found = tuple[Trace, list[float], dict[str, torch.Tensor]]


def train(engine: FsdpEngine, system: str, steps: int) -> Trace:
    """Loss per position and gradient norm of every step."""
    trace: Trace = []
    rows, parts, lr = (ROWS, 2, 1e-2) if steps == STEPS else (2 * ROWS, 1, 1e-3)
    for step in range(steps):
        loss = backward(engine, SYSTEMS[system], step, rows=rows, parts=parts)
        norm = engine.reduce_and_clip(1.0)
        engine.step(lr=lr, take=torch.ones(()))
        trace.append((loss, float(norm)))
    return trace


def cases() -> Iterator[tuple[str, str, TrainConfig]]:
    for layout in LAYOUTS:
        for system in COVERED.get(layout, FEW):
            yield layout, system, TrainConfig()
        if layout != "hybrid":
            yield layout, "mdlm", TrainConfig(precision="bf16")
        yield layout, "all", TrainConfig(recompute="selective")


def run_rank(rank: int, rendezvous: str) -> None:
    """Every case on this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    meshes = {name: build_mesh(torch.device("cpu"), shape) for name, shape in LAYOUTS.items()}
    alone = shared([(name, TrainConfig(), STEPS) for name in SYSTEMS])
    alone |= shared([(*case, MANY) for case in LONG])
    for layout in ("tensor", "context_tensor"):
        check_shards_of_positions(meshes[layout])
    for layout, system, settings in cases():
        found = run(meshes[layout], system, settings, STEPS)
        check(found, alone[system, TrainConfig(), STEPS], f"{layout}, {system}, {settings}", settings)
    for system, settings in LONG:
        found = run(meshes["hybrid"], system, settings, MANY)
        check(found, alone[system, settings, MANY], f"hybrid, {system}, {settings}", settings)
    dist.destroy_process_group()


def shared(cases: list[Case]) -> dict[Case, Found]:
    """What one process finds in each case; every rank computes some of them for all."""
    mine = {case: run(single_process(), *case) for case in cases[dist.get_rank() :: WORLD]}
    everyones: list[dict[Case, Found]] = [{}] * WORLD
    dist.all_gather_object(everyones, mine)
    return {case: found for theirs in everyones for case, found in theirs.items()}


def check_shards_of_positions(mesh: Mesh) -> None:
    """Norms see this process's positions, and each sublayer's rows are gathered once and scattered once, and back."""
    model = SYSTEMS["vadd"]
    engine = FsdpEngine(model, OptimConfig(), TrainConfig(), ParallelConfig(), mesh, seed=5)
    seen: list[int] = []
    for module in engine.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[1]))
    micro, *_ = micros(mesh, model, 0, rows=ROWS)
    with CommDebugMode() as counter:
        engine.forward_backward(micro, scale=1.0, last=True)
    num_blocks = model.backbone.num_layers + 1  # of the denoiser, and of the recognition network
    assert seen == [LENGTH // (mesh.context.size * mesh.tensor.size)] * (2 * num_blocks + 2)
    counts = counter.get_comm_counts()
    functional = torch.ops.c10d_functional
    assert counts[functional.all_gather_into_tensor] == counts[functional.reduce_scatter_tensor] == 4 * num_blocks


def run(mesh: Mesh, system: str, settings: TrainConfig, steps: int) -> Found:
    """Trace, evaluation and final weights."""
    engine = FsdpEngine(SYSTEMS[system], OptimConfig(), settings, ParallelConfig(), mesh, seed=5)
    trace, rows = train(engine, system, steps), row_losses(engine, SYSTEMS[system], rows=ROWS)
    return trace, rows, whole(engine.state_dict()["model"])


def check(found: Found, wanted: Found, case: str, settings: TrainConfig) -> None:
    """Raises AssertionError where the layout shows."""
    tolerance = TOLERANCE[settings.precision]
    for step, (ours, theirs) in enumerate(zip(found[0], wanted[0], strict=True)):
        assert ours == pytest.approx(theirs, rel=tolerance), f"{case}: step {step}"
    assert found[1] == pytest.approx(wanted[1], rel=10 * tolerance), case
    if settings.precision == "fp32":
        for name, weight in wanted[2].items():
            difference = float((found[2][name] - weight).abs().max())
            assert difference < 2e-4, f"{case}: {name} differs by {difference}"


def test_no_layout_shows_in_the_numbers(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
