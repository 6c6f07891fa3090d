"""A whole run on a GPU: it computes what a CPU computes, goes on from its checkpoints, and moves between the two."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.load import load_for_evaluation
from pretrain.checkpoint.save import checkpoint_name
from pretrain.config import ParallelConfig, RunConfig
from pretrain.parallel import mesh
from pretrain.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEVICE = torch.device("cuda")
LATENT = ("model.latent.dim=8", "model.latent.recognition.num_layers=1", "model.backbone.condition_dim=16")
SYSTEMS = {
    "mdlm": (),
    "cadd": ("model.augmentation.hint_half_life=0.4",),
    "vadd": LATENT,
    "block_vmd": (*LATENT, "model.block_size=8"),
}
EXACT = ("model.backbone.dropout=0.0",)
MakeConfig = Callable[..., RunConfig]
Trace = dict[int, dict[str, Any]]
ReadTrace = Callable[[Path], Trace]


def assert_close(found: Trace, wanted: Trace, *, rel: float) -> None:
    assert found.keys() == wanted.keys()
    for step, line in wanted.items():
        words, numbers = ({k: v for k, v in line.items() if isinstance(v, str) == wish} for wish in (True, False))
        assert {k: found[step][k] for k in words} == words
        assert {k: found[step][k] for k in numbers} == pytest.approx(numbers, rel=rel, abs=1e-6), step


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], None]:
    def run(config: RunConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(mesh, "_device", lambda environ: torch.device("cpu"))
            train(config)

    return run


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_trains_as_a_cpu_does(
    system: str, tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, on_cpu: Callable[[RunConfig], None]
) -> None:
    on_cpu(make_config(tmp_path / "cpu", *SYSTEMS[system]))
    train(make_config(tmp_path / "gpu", *SYSTEMS[system]))
    assert_close(trace(tmp_path / "gpu"), trace(tmp_path / "cpu"), rel=2e-3)


def test_a_run_moves_from_a_gpu_to_a_cpu(
    tmp_path: Path, make_config: MakeConfig, trace: ReadTrace, on_cpu: Callable[[RunConfig], None]
) -> None:
    whole, moved = (tmp_path / name for name in ("whole", "moved"))
    train(make_config(whole))
    train(make_config(moved))
    shutil.rmtree(moved / "checkpoints" / checkpoint_name(12))
    on_cpu(make_config(moved))
    assert_close(trace(moved), trace(whole), rel=2e-3)
    assert next(load_for_evaluation(moved).model.parameters()).device.type == DEVICE.type


@pytest.mark.parametrize(
    "settings",
    [
        ("train.compile=true",),
        ("train.precision=bf16",),
        ("train.precision=bf16", "train.compile=true", "train.recompute=full"),
        ("train.precision=bf16", "train.attention=flash", "train.recompute=selective"),
        ("train.attention=flex", "train.compile=true"),
    ],
    ids=",".join,
)
def test_what_a_gpu_can_do_besides(
    settings: tuple[str, ...], tmp_path: Path, make_config: MakeConfig, trace: ReadTrace
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    shared = (*EXACT, "validation.every=0", "train.steps=6")
    train(make_config(plain, *shared))
    train(make_config(other, *shared, *settings))
    losses = [[line["train.loss"] for line in trace(folder).values()] for folder in (other, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "train.precision=bf16" in settings else 1e-4)


@pytest.fixture
def in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs meet in a process group of one, so that FSDP shards although there is nobody to share with."""

    @contextmanager
    def group_of_one(parallel: ParallelConfig) -> Iterator[mesh.Mesh]:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield mesh.build_mesh(DEVICE, mesh.mesh_shape(parallel, 1))
        finally:
            dist.destroy_process_group()

    monkeypatch.setattr(mesh, "process_mesh", group_of_one)


@pytest.mark.usefixtures("in_a_group")
def test_weights_may_wait_on_the_host(tmp_path: Path, make_config: MakeConfig, trace: ReadTrace) -> None:
    train(make_config(tmp_path / "held"))
    train(make_config(tmp_path / "offloaded", "parallel.offload=true"))
    assert_close(trace(tmp_path / "offloaded"), trace(tmp_path / "held"), rel=2e-3)


def test_profiles_of_time_and_memory(tmp_path: Path, make_config: MakeConfig) -> None:
    train(make_config(tmp_path / "run", "log.profile_steps=[4,6]", "log.memory_snapshot=3"))
    written = {path.name for path in (tmp_path / "run" / "profiles").rglob("*") if path.is_file()}
    assert any("json" in name for name in written), written
    assert any("pickle" in name for name in written), written
