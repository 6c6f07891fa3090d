"""A run that stops at one number and layout of processes goes on at another, as if nothing had happened."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pretrain import throughput
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation
from pretrain.config import RunConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.hooks.metrics import read_metrics
from pretrain.parallel import mesh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("recorded_training.py")
Trace = dict[int, dict[str, Any]]
STEPS = 12
COMPARED = ("train.loss", "train.ce", "train.grad_norm", "train.kl", "validation.nll_discrete")
"""The last one at every fourth step."""


@dataclass(frozen=True)
class Leg:
    """A run on so many processes, from the checkpoint of another one."""

    processes: int
    overrides: tuple[str, ...] = ()
    after: str | None = None
    step: int = 0


LEGS = {
    "four": Leg(4),
    "tensor": Leg(4, ("parallel.tensor=2",), after="four", step=4),
    "context": Leg(4, ("parallel.context=2", "parallel.replicate=2"), after="four", step=4),
    "three": Leg(3, (), after="tensor", step=8),
    "two": Leg(2, ("parallel.tensor=2",), after="context", step=8),
    "replicas": Leg(2, ("parallel.replicate=2",), after="four", step=4),
    "one": Leg(1, (), after="replicas", step=8),
    "alone": Leg(1),
    "from_one": Leg(3, (), after="alone", step=4),
}
"""In an order in which every leg's checkpoint is there when it starts."""
SYSTEM = ("model.latent.dim=4", "model.backbone.condition_dim=8", "model.block_size=8", "model.augmentation.fusion=add")


@dataclass
class Journey:
    """Folders of the legs, and what they logged."""

    folder: Path
    read: Callable[[Path], Trace]
    configs: dict[str, Path] = field(default_factory=dict)

    def trace(self, name: str) -> Trace:
        return self.read(self.folder / name)

    def noise(self, name: str) -> dict[str, Any]:
        parts = [json.loads(file.read_text()) for file in (self.folder / name).glob("noise-*.json")]
        return {index: row for part in parts for index, row in part.items()}


def run(processes: int, paths: list[Path]) -> None:
    """Trains configurations on so many processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run([*torchrun, DRIVER, *paths], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def run_here(paths: list[Path]) -> None:
    """The same in this process, its patches taken back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpEngine, "forward_backward", FsdpEngine.forward_backward)
        patch.setattr(mesh, "process_mesh", mesh.process_mesh)
        patch.setattr(throughput, "peak_flops", throughput.peak_flops)
        runpy.run_path(str(DRIVER))["main"](list(map(str, paths)))


@pytest.fixture(scope="module")
def journey(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
    trace: Callable[[Path], Trace],
) -> Journey:
    made = Journey(tmp_path_factory.mktemp("journey"), trace)
    waiting = dict(LEGS)
    while waiting:
        processes = next(iter(waiting.values())).processes
        ready = [n for n, leg in waiting.items() if leg.processes == processes and leg.after not in waiting]
        for name in ready:
            made.configs[name] = prepare(made.folder, name, waiting.pop(name), make_config, write_config)
        (run_here if processes == 1 else lambda paths, n=processes: run(n, paths))([made.configs[n] for n in ready])
    return made


def prepare(
    folder: Path,
    name: str,
    leg: Leg,
    make_config: Callable[..., RunConfig],
    write_config: Callable[[RunConfig, Path], Path],
) -> Path:
    """The configuration of a leg, with the checkpoint it goes on from in its folder."""
    settings = (f"train.steps={STEPS}", "train.batch_tokens=384", "validation.every=4", *SYSTEM, *leg.overrides)
    if leg.after is not None:
        step = f"{CHECKPOINTS}/step-{leg.step:08d}"
        shutil.copytree(folder / leg.after / step, folder / name / step)
    return write_config(make_config(folder / name, *settings), folder / f"{name}.yaml")


def test_every_leg_goes_on_as_if_nothing_had_happened(journey: Journey) -> None:
    """One test, because its runs are expensive and test processes do not share them."""
    whole, masks = journey.trace("alone"), journey.noise("alone")
    assert sorted(whole) == list(range(1, STEPS + 1))
    rows = len(masks) // STEPS
    for name, leg in LEGS.items():
        found = journey.trace(name)
        assert sorted(found) == list(range(leg.step + 1, STEPS + 1)), name
        for step, line in found.items():
            compared = [k for k in whole[step] if k in COMPARED]
            assert len(compared) == len(COMPARED) - (step % 4 > 0)
            for key in compared:
                assert line[key] == pytest.approx(whole[step][key], rel=2e-5), f"{name}: {key} at step {step}"
        assert journey.noise(name) == {i: row for i, row in masks.items() if int(i) >= leg.step * rows}, name


def test_processes_count_the_operations_that_they_share_once(journey: Journey) -> None:
    """Operations per token of one of four processes, whatever they divide among them, are a quarter of those of one."""

    def per_token(name: str) -> float:
        lines = [r for r in read_metrics(journey.folder / name / "metrics.jsonl") if r["kind"] == "train"]
        return float(sum(line["mfu"] / line["tokens_per_second"] for line in lines) / len(lines))

    for name in ("four", "tensor", "context"):
        assert per_token(name) == pytest.approx(per_token("alone") / 4, rel=0.1)


def test_what_any_layout_wrote_loads_for_evaluation(journey: Journey) -> None:
    wanted = dict(load_for_evaluation(journey.folder / "alone").model.named_parameters())
    for name in ("tensor", "context", "three"):
        for key, parameter in load_for_evaluation(journey.folder / name).model.named_parameters():
            assert float((parameter.detach() - wanted[key].detach()).abs().max()) < 1e-4, f"{name}: {key}"
