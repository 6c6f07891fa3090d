"""Parallel efficiency: processes that train one model together, against as many that train alone at the same time.

All of them run the trainer's own loop, and groups of them take turns: those that divide the batch and add their
gradients up, those that shard the weights as well, those that are alone. Who is not in turn sleeps.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from data_pipeline.packing import Rows
from data_pipeline.tokenizers import value_tokenizer
from model.config import ModelConfig, TransformerConfig
from pretrain.config import RunConfig
from pretrain.data import Data
from pretrain.engines import make_engine
from pretrain.hooks.base import Hook
from pretrain.parallel.mesh import build_mesh, mesh_shape, single_process
from pretrain.settings import validate
from pretrain.trainer import Trainer


@dataclass(frozen=True)
class Work:
    """What every process trains; the mask is the last token of the vocabulary.

    Args:
        length: positions of a row.
        tokens: of each process and step.
        steps: of a turn.
    """

    backbone: TransformerConfig = TransformerConfig(dim=256, num_layers=12, num_heads=4)
    vocab_size: int = 50_258
    length: int = 256
    tokens: int = 4096
    steps: int = 2

    @property
    def model(self) -> ModelConfig:
        """Plain masked diffusion."""
        return ModelConfig(backbone=self.backbone, vocab_size=self.vocab_size, mask_id=self.vocab_size - 1)


WORK = Work()
NUM_PROCESSES = 2
REPLICAS = {"together": NUM_PROCESSES, "sharded": 1, "alone": 0}
"""Groups of processes and their parallel.replicate; 0: every process is a run of its own."""
SETTINGS = {
    "model": f"MDLM, DiT of {WORK.backbone.num_layers} layers x {WORK.backbone.dim}, vocabulary {WORK.vocab_size:,}",
    "length": WORK.length,
    "tokens_per_process_and_step": WORK.tokens,
    "steps_per_turn": WORK.steps,
    "precision": "fp32",
    "together": f"engine=fsdp parallel.replicate={NUM_PROCESSES} on gloo: {NUM_PROCESSES} processes of one thread each",
    "sharded": "the same with parallel.replicate=1: weights, gradients and moments are sharded",
    "ratio_to": f"{NUM_PROCESSES} processes of one thread each training alone at the same time, in turn with the rest",
}
TARGETS = {"scaling.efficiency": 0.92}
Seconds = Mapping[str, Sequence[float]]


def measure(repeats: int, work: Work = WORK) -> dict[str, float]:
    """Tokens per second of every group, medians of all turns but the first, and ratios to those that are alone."""
    with tempfile.TemporaryDirectory() as folder:
        groups = {name: [_start(name, rank, work, folder) for rank in range(NUM_PROCESSES)] for name in REPLICAS}
        rounds = [{name: _take_turn(group) for name, group in groups.items()} for _ in range(repeats + 1)]
        for group in groups.values():
            for connection, _ in group:
                connection.close()
            for _, process in group:
                process.join()
    return summarise(rounds[1:], work.tokens * work.steps)


def summarise(rounds: Sequence[Seconds], tokens: int) -> dict[str, float]:
    """Results from the seconds of each process of each group in every round; a process computes `tokens` in a turn.

    A step that is shared ends when its last process has ended; those that are alone do not wait for one another.
    """
    speeds = {
        name: statistics.median(_tokens_per_second(r[name], tokens, shared=name != "alone") for r in rounds)
        for name in REPLICAS
    }
    return {
        "scaling.efficiency": speeds["together"] / speeds["alone"],
        "scaling.sharded.efficiency": speeds["sharded"] / speeds["alone"],
        **{f"scaling.{name}.tokens_per_second": speed for name, speed in speeds.items()},
    }


def as_table(results: Mapping[str, float]) -> str:
    """One line per number, then one per target."""
    lines = [f"{key:<36} {value:>10,.4g}" for key, value in results.items()]
    for key, least in TARGETS.items():
        verdict = "met" if results[key] >= least else "missed"
        lines.append(f"{key} = {results[key]:.3f}, target at least {least:.2f}: {verdict}")
    return "\n".join(lines)


def _tokens_per_second(seconds: Sequence[float], tokens: int, *, shared: bool) -> float:
    return len(seconds) * tokens / max(seconds) if shared else sum(tokens / each for each in seconds)


class Turns(Hook):
    """Holds a run up until its turn has come, and says how long the turn took.

    Raises:
        EOFError: there are no more turns.
    """

    def __init__(self, connection: Connection, steps: int) -> None:
        self.connection, self.steps, self.started = connection, steps, 0.0

    def on_step_start(self, step: int) -> None:
        """The loop has its batch and has heard the others."""
        if (step - 1) % self.steps:
            return
        if step > 1:
            self.connection.send(time.perf_counter() - self.started)
        self.connection.recv()
        self.started = time.perf_counter()


class RandomRows:
    """Rows of random tokens, the mask not among them."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __len__(self) -> int:
        return 1 << 20

    def gather(self, indices: npt.NDArray[np.int64]) -> Rows:
        """See Source."""
        shape = (len(indices), self.work.length)
        generator = torch.Generator().manual_seed(int(indices[0]))
        return {
            "tokens": torch.randint(self.work.vocab_size - 1, shape, generator=generator),
            "maskable": torch.ones(shape, dtype=torch.bool),
            "document": torch.zeros(shape, dtype=torch.int32),
            "positions": torch.arange(self.work.length).expand(shape),
        }


def _start(name: str, rank: int, work: Work, folder: str) -> tuple[Connection, BaseProcess]:
    """A process of a group, and the line to it."""
    spawned = multiprocessing.get_context("spawn")
    ours, theirs = spawned.Pipe()
    process = spawned.Process(target=_train, args=(name, rank, work, Path(folder), theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _take_turn(group: Sequence[tuple[Connection, BaseProcess]]) -> list[float]:
    """Lets the processes of a group compute; the seconds of each."""
    for connection, _ in group:
        connection.send("go")
    return [connection.recv() for connection, _ in group]


def _train(name: str, rank: int, work: Work, folder: Path, connection: Connection) -> None:
    """A process, until there are no more turns."""
    torch.set_num_threads(1)
    replicas = REPLICAS[name]
    config = _run_config(work, replicas, folder / "runs" / (name if replicas else f"{name}-{rank}"))
    mesh = single_process()
    if replicas:
        meeting = f"file://{folder / name}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_PROCESSES)
        mesh = build_mesh(torch.device("cpu"), mesh_shape(config.parallel, NUM_PROCESSES))
    engine = make_engine(config, work.model, mesh)
    data = Data(RandomRows(work), None, value_tokenizer(1))
    try:
        Trainer(config, work.model, engine, data, hooks=[Turns(connection, work.steps)]).run()
    except EOFError:
        if replicas:
            dist.destroy_process_group()


def _run_config(work: Work, replicas: int, folder: Path) -> RunConfig:
    """A run without an end, which neither validates nor saves."""
    num_processes = NUM_PROCESSES if replicas else 1
    return validate(
        {
            "name": "scaling",
            "folder": str(folder),
            "data": {"kind": "shards", "path": "", "length": work.length, "num_workers": 0},
            "train": {"steps": 10**6, "batch_tokens": work.tokens * num_processes},
            "parallel": {"replicate": max(1, replicas)},
            "validation": {"every": 0},
            "checkpoint": {"every": 0},
        }
    )
