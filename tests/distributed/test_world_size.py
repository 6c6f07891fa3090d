"""Two processes compute what one computes, and read each other's checkpoints."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import throughput
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation
from pretrain.config import RunConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel import mesh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("recorded_training.py")
HALF = "step-00000004"
Trace = dict[int, dict[str, Any]]
LATENT = ("model.latent.dim=4", "model.backbone.condition_dim=8", "train.kl_anneal_steps=6")
RUNS: dict[str, tuple[tuple[str, ...], float]] = {
    "fp32": ((), 1e-5),
    "bf16": (("train.precision=bf16",), 5e-3),
    "vadd": (LATENT, 1e-5),
    "block_vmd": ((*LATENT, "model.block_size=8", "model.backbone.modulation=shared"), 1e-5),
    "prior": ((*LATENT, "model.block_size=8", "model.latent.prior=earlier_blocks"), 1e-5),
    "cadd": (("model.augmentation.fusion=concat", "model.augmentation.mse_weight=0.1"), 1e-5),
    "annealed": (("train.attention_anneal=bernoulli", "train.attention_anneal_steps=6"), 1e-5),
    "frozen": ((*LATENT, "train.freeze=[denoiser\\.(embed|blocks\\.0)\\..*]"), 1e-5),
}
"""Overrides, and how near two processes come to one."""

HOW_CUT = {
    "validation.nelbo_error",  # a spread, not a mean: rounding moves it more
    "validation.delbo_error",
    "validation.nll_discrete_error",
    "train.mutual_information",  # compares the samples of one forward pass
}


def in_two(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Runs a script, or -m and a module, in two processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)


def in_one(*paths: Path) -> None:
    """Runs the driver in this process, and takes its patches back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpEngine, "forward_backward", FsdpEngine.forward_backward)
        patch.setattr(mesh, "process_mesh", mesh.process_mesh)
        patch.setattr(throughput, "peak_flops", throughput.peak_flops)
        runpy.run_path(str(DRIVER))["main"](list(map(str, paths)))


@dataclass(frozen=True)
class Worlds:
    """Folders of the runs: NAME-1 of one process, NAME-2 of two."""

    folder: Path
    read: Callable[[Path], Trace]

    def trace(self, name: str) -> Trace:
        return self.read(self.folder / name)

    def noise(self, name: str) -> dict[str, Any]:
        files = sorted((self.folder / name).glob("noise-*.json"))
        parts: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
        assert sum(map(len, parts)) == len(set().union(*parts))
        return {index: row for part in parts for index, row in part.items()}


@pytest.fixture(scope="module")
def worlds(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
    trace: Callable[[Path], Trace],
) -> Worlds:
    folder = tmp_path_factory.mktemp("worlds")

    def config(name: str, *overrides: str, resumes: str | None = None) -> Path:
        settings = ["train.steps=8", "validation.every=4", *overrides]
        made = make_config(folder / name, *settings)
        if resumes is not None:
            shutil.copytree(folder / resumes / CHECKPOINTS / HALF, folder / name / CHECKPOINTS / HALF)
        return write_config(made, folder / f"{name}.yaml")

    in_one(*(config(f"{name}-1", *overrides) for name, (overrides, _) in RUNS.items()))
    result = in_two(
        DRIVER,
        *(config(f"{name}-2", *overrides) for name, (overrides, _) in RUNS.items()),
        config("split-2", "train.micro_batch_tokens=96", "train.recompute=full"),
        config("from-1-in-2", resumes="fp32-1"),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    in_one(config("from-2-in-1", resumes="fp32-2"))
    return Worlds(folder, trace)


def assert_close(ours: Trace, theirs: Trace, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for step, line in theirs.items():
        assert ours[step].keys() == line.keys()
        for key, value in line.items():
            if key not in HOW_CUT:
                wanted = value if isinstance(value, str) else pytest.approx(value, rel=tolerance)
                assert ours[step][key] == wanted, (step, key)


def test_two_processes_compute_what_one_computes(worlds: Worlds) -> None:
    """One test, because its runs are expensive and test processes do not share them."""
    for name, (_, tolerance) in RUNS.items():
        check_losses_norms_and_bounds(worlds, name, tolerance)
    assert_close(worlds.trace("split-2"), worlds.trace("fp32-1"), 1e-5)
    one = worlds.noise("fp32-1")
    assert sorted(map(int, one)) == list(range(8 * 16))
    for name in ("fp32-2", "bf16-2", "split-2", "vadd-2", "cadd-2"):
        assert worlds.noise(name) == one, name
    assert worlds.noise("block_vmd-2") == worlds.noise("block_vmd-1")
    for name in ("from-1-in-2", "from-2-in-1"):
        check_resume(worlds, name)
    for name in ("fp32", "prior", "cadd", "frozen"):
        check_weights(worlds, name, averaged=name != "prior")
    check_weights(worlds, "fp32", averaged=False)


def check_losses_norms_and_bounds(worlds: Worlds, name: str, tolerance: float) -> None:
    one, two = worlds.trace(f"{name}-1"), worlds.trace(f"{name}-2")
    assert sorted(one) == list(range(1, 9))
    kind = {"fp32": "nelbo", "bf16": "nelbo", "annealed": "nelbo", "cadd": "nll_discrete"}.get(name, "delbo")
    assert {"train.loss", "train.ce", "train.grad_norm", f"validation.{kind}"} <= one[8].keys()
    assert ("train.kl" in one[8]) == (kind == "delbo")
    assert_close(two, one, tolerance)


def check_resume(worlds: Worlds, name: str) -> None:
    """A checkpoint goes on at another world size."""
    expected = {step: line for step, line in worlds.trace("fp32-1").items() if step > 4}
    assert_close(worlds.trace(name), expected, 1e-5)
    one, other = worlds.noise("fp32-1"), worlds.noise(name)
    assert other == {index: row for index, row in one.items() if int(index) >= 4 * 16}


def check_weights(worlds: Worlds, name: str, *, averaged: bool) -> None:
    """What two processes saved loads for evaluation."""
    one, two = (load_for_evaluation(worlds.folder / f"{name}-{size}", averaged=averaged) for size in (1, 2))
    ours = dict(two.model.named_parameters())
    for parameter_name, parameter in one.model.named_parameters():
        torch.testing.assert_close(ours[parameter_name], parameter, rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_divide_is_refused_by_every_process(
    tmp_path: Path, make_config: Callable[..., RunConfig], write_config: Callable[[RunConfig, Path], Path]
) -> None:
    config = make_config(tmp_path / "run", "train.batch_tokens=96")
    result = in_two("-m", "pretrain.train", write_config(config, tmp_path / "run.yaml"))
    assert result.returncode != 0
    sentence = "a batch of 3 rows (train.batch_tokens / data.length) does not divide among 2 processes: use one of"
    assert f"penumbra: {sentence} [1, 3] processes" in result.stderr
    assert "exitcode  : 2" in result.stderr
    assert not config.path.exists()
