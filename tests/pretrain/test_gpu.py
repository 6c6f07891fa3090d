"""A whole run on a GPU: it computes what a CPU computes, goes on from its checkpoints, and moves between the two."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.load import load_for_evaluation
from pretrain.config import RunConfig
from pretrain.parallel import mesh
from pretrain.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ROOT = Path(__file__).resolve().parents[2]
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
        assert found[step] == pytest.approx(line, rel=rel, abs=1e-6), step


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
    shutil.rmtree(moved / "checkpoints" / "step-12")
    on_cpu(make_config(moved))
    assert_close(trace(moved), trace(whole), rel=2e-3)
    assert next(load_for_evaluation(moved).model.parameters()).device.type == "cuda"


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


@pytest.mark.parametrize("settings", [(), ("parallel.offload=true",)], ids=["nccl", "offload"])
def test_sharded_on_one_gpu(
    settings: tuple[str, ...],
    tmp_path: Path,
    make_config: MakeConfig,
    write_config: Callable[[RunConfig, Path], Path],
    trace: ReadTrace,
) -> None:
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    train(make_config(alone))
    config = write_config(make_config(sharded, *settings), tmp_path / "sharded.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, sys.path)))}
    subprocess.run([*command, "-m", "pretrain.train", str(config)], env=environment, check=True)
    assert_close(trace(sharded), trace(alone), rel=2e-3)


def test_profiles_of_time_and_memory(tmp_path: Path, make_config: MakeConfig) -> None:
    train(make_config(tmp_path / "run", "log.profile_steps=[4,6]", "log.memory_snapshot=3"))
    written = {path.name for path in (tmp_path / "run" / "profiles").rglob("*") if path.is_file()}
    assert any("json" in name for name in written), written
    assert any("pickle" in name for name in written), written
