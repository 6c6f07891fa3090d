"""Four processes in every layout compute what one computes: losses, gradient norms, and weights after five steps."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from model.batch import Batch
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.noise import NoiseKey
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Mesh, build_mesh, single_process

pytestmark = pytest.mark.slow

WORLD, ROWS, LENGTH, VOCAB, STEPS = 4, 8, 16, 21, 5
LAYOUTS = {
    "sharded": (1, 4, 1, 1),
    "replicated": (2, 2, 1, 1),
    "tensor": (1, 2, 1, 2),
    "replicated_tensor": (2, 1, 1, 2),
    "context": (1, 2, 2, 1),
    "context_tensor": (1, 1, 2, 2),
}
"""Sizes of the axes: replicate, shard, context, tensor."""

MDLM = ModelConfig(
    backbone=TransformerConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, dropout=0.1),
    vocab_size=VOCAB,
    mask_id=VOCAB - 1,
)
VADD = replace(
    MDLM,
    backbone=replace(MDLM.backbone, condition_dim=8, max_positions=LENGTH),
    latent=LatentConfig(dim=4, recognition=RecognitionConfig(num_layers=1, pool="gated")),
)
SYSTEMS = {
    "mdlm": MDLM,
    "untied": replace(MDLM, backbone=replace(MDLM.backbone, tie_embeddings=False, ffn="swiglu", norm="rmsnorm")),
    "vadd": VADD,
    "block_vmd": replace(VADD, block_size=4),
    "prior": replace(VADD, block_size=4, latent=replace(VADD.latent, prior="earlier_blocks")),  # type: ignore[type-var]
    "cadd": replace(MDLM, augmentation=AugmentationConfig(fusion="concat")),
    "all": replace(VADD, block_size=4, augmentation=AugmentationConfig(path="vp", fusion="reweight")),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
Trace = list[tuple[float, float]]


def micros(mesh: Mesh, model: ModelConfig, step: int) -> list[Micro]:
    """This rank's rows of the step's batch, as two micro-batches, the second row shorter in documents."""
    generator = torch.Generator().manual_seed(step)
    whole = Batch(
        tokens_BL=torch.randint(VOCAB - 1, (ROWS, LENGTH), generator=generator),
        maskable_BL=torch.rand(ROWS, LENGTH, generator=generator) < 0.9,
        document_BL=(torch.arange(LENGTH) >= 8).int().expand(ROWS, LENGTH),
        positions_BL=torch.arange(LENGTH).remainder(8).expand(ROWS, LENGTH),
        index_B=torch.arange(ROWS) + step * ROWS,
    )
    share = ROWS // mesh.data.size
    mine = whole.rows(mesh.data.rank * share, (mesh.data.rank + 1) * share)
    corruption = corrupt(mine, NoiseKey(3, step, mine.index_B), model)
    return Micro(mine, corruption, StepSchedule(kl_weight=0.7)).split(share // 2)


def train(engine: FsdpEngine, mesh: Mesh, model: ModelConfig) -> Trace:
    """Loss per position and gradient norm of every step."""
    trace: Trace = []
    for step in range(STEPS):
        parts = micros(mesh, model, step)
        (count,) = mesh.data.all_reduce([sum(m.corruption.divisor for m in parts)])
        terms = [engine.forward_backward(m, scale=1 / count, last=m is parts[-1]) for m in parts]
        norm = engine.reduce_and_clip(1.0)
        engine.step(lr=1e-2, take=torch.ones(()))
        (loss,) = mesh.sums.all_reduce([sum(float(t.loss) for t in terms)])
        trace.append((loss / count, float(norm)))
    return trace


def evaluated(engine: FsdpEngine, mesh: Mesh, model: ModelConfig) -> list[float]:
    """The loss of every row, gathered in order."""
    rows = torch.cat([engine.evaluate(m).loss_B for m in micros(mesh, model, 99)]).double()
    place = torch.zeros(ROWS, dtype=torch.float64)
    place[mesh.data.rank * len(rows) : (mesh.data.rank + 1) * len(rows)] = rows
    return mesh.data.all_reduce(place.tolist())


def cases() -> Iterator[tuple[str, str, TrainConfig]]:
    for layout in LAYOUTS:
        for system in SYSTEMS:
            yield layout, system, TrainConfig()
        yield layout, "mdlm", TrainConfig(precision="bf16")
        yield layout, "all", TrainConfig(recompute="selective")


def run_rank(rank: int, rendezvous: str) -> None:
    """Every case on this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    meshes = {name: build_mesh(torch.device("cpu"), shape) for name, shape in LAYOUTS.items()}
    alone = {name: run(single_process(), name, TrainConfig()) for name in SYSTEMS}
    for layout, system, settings in cases():
        check(run(meshes[layout], system, settings), alone[system], f"{layout}, {system}, {settings}", settings)
    dist.destroy_process_group()


def run(mesh: Mesh, system: str, settings: TrainConfig) -> tuple[Trace, list[float], dict[str, torch.Tensor]]:
    """Trace, evaluation and final weights."""
    model = SYSTEMS[system]
    engine = FsdpEngine(model, OptimConfig(), settings, ParallelConfig(), mesh, seed=5)
    trace, rows = train(engine, mesh, model), evaluated(engine, mesh, model)
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in engine.state_dict()["model"].items()}
    return trace, rows, weights


def check(found, wanted, case: str, settings: TrainConfig) -> None:  # type: ignore[no-untyped-def]
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
