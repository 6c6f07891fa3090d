"""The loop, and only the loop: data order, noise keys, learning rate, skip decision, hooks, checkpoint timing."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.loader import Loader
from data_pipeline.order import Order
from model.batch import Batch
from model.bounds import Bound, BoundSums
from model.collapse import LatentReport, latent_report
from model.config import ModelConfig
from model.corruption import corrupt, corrupt_uniform_count
from model.diffusion import LossTerms, StepSchedule
from model.flops import training_flops
from model.noise import NoiseKey

from .checkpoint.load import CHECKPOINTS, initialise_from, newest_good, resume
from .checkpoint.manifest import Kind
from .checkpoint.saver import Saver
from .config import RunConfig
from .data import Data
from .engines.base import Engine, Micro
from .hooks.base import Hook, StepRecord
from .schedules import learning_rate, step_schedule
from .state import TrainState


def corrupt_step(
    step: int, rows: dict[str, Tensor], *, model: ModelConfig, seed: int, schedule: Callable[[int], StepSchedule]
) -> Micro:
    """A rank's rows of one step, corrupted; runs ahead of the loop in a loader's worker."""
    batch = Batch.of(rows)
    return Micro(batch, corrupt(batch, NoiseKey(seed, step, batch.index_B), model), schedule(step))


@dataclass(frozen=True)
class Latest:
    """The newest step's sums, still on the device."""

    terms: list[LossTerms]
    norm: Tensor
    lr: float
    scale: float
    all_masked: float


@dataclass
class Window:
    """The steps since the last log line."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    flops: int = 0
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    latest: Latest | None = None

    def add(self, *, flops: int, skipped: Tensor, latest: Latest) -> None:
        """One more step."""
        self.steps += 1
        self.flops += flops
        self.skipped = self.skipped.to(skipped.device) + skipped
        self.latest = latest

    def seconds(self) -> float:
        """Wall time since the window opened, pauses left out."""
        return time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within the context does not count as training."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began


@dataclass
class Trainer:
    """One run: its configuration, its engine and data, and the hooks that watch it."""

    config: RunConfig
    model: ModelConfig
    engine: Engine
    data: Data
    hooks: Sequence[Hook]
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        self.mesh = self.engine.mesh
        self.state = TrainState(identity=run_identity(self.config, self.data))
        self.window = Window()
        self.rows_per_rank = _divide(self.config, self.mesh.data.size)
        micro_tokens = self.config.train.micro_batch_tokens
        micro_rows = self.rows_per_rank if micro_tokens is None else micro_tokens // self.config.data.length
        self.micro_rows = min(micro_rows, self.rows_per_rank)

    def run(self) -> TrainState:
        """Trains from the newest good checkpoint (or from nothing) to the last step."""
        with Saver(
            self.config.path / CHECKPOINTS,
            self.config.checkpoint,
            self.model,
            self.mesh,
            save_tokenizer=self.data.tokenizer.save,
            on_sealed=self._announce,
        ) as self.saver:
            return self._run()

    def _run(self) -> TrainState:
        checkpoint = newest_good(self.config.path / CHECKPOINTS, self.mesh.world)
        if checkpoint is not None:
            self.state = resume(checkpoint, self.engine, self.model, self.state.identity)
            self.state.resumes += self.state.step < self.config.train.steps
        elif self.config.init_from:
            taken = initialise_from(Path(self.config.init_from), self.engine, self.data.tokenizer)
            if self.mesh.world.rank == 0:
                print(taken, flush=True)
        for hook in self.hooks:
            hook.on_start(self.state, resumed=checkpoint is not None)
        self.window = Window()
        for share in self._batches():
            self._step(share)
            if self._due(self.config.log.every):
                self._log()
            with self.window.paused():
                if self._due(self.config.validation.every):
                    self._validate()
                self.saver.poll()
                if self._due(self.config.checkpoint.every):
                    self._save()
                elif self._due(self.config.log.every) and self.saver.ephemeral_due():
                    self._save("ephemeral")
        self.saver.finish()
        for hook in self.hooks:
            hook.on_finish(self.state)
        return self.state

    def _batches(self) -> Iterator[Micro]:
        return iter(
            Loader(
                self.data.train,
                Order(len(self.data.train), self.config.seed),
                global_batch=self.config.batch_rows,
                rank=self.mesh.data.rank,
                size=self.mesh.data.size,
                first_step=self.state.step,
                num_steps=self.config.train.steps,
                num_workers=self.config.data.num_workers,
                transform=partial(
                    corrupt_step,
                    model=self.model,
                    seed=self.config.seed,
                    schedule=partial(step_schedule, config=self.config),
                ),
                pin_memory=self.mesh.device.type == "cuda",
            )
        )

    def _step(self, share: Micro) -> None:
        """One optimizer step; nothing here waits for the device."""
        config, step = self.config, self.state.step
        masked = share.corruption.num_masked
        divisor, all_masked = self.mesh.data.all_reduce([share.corruption.divisor, masked])
        scale = 1.0 / max(1.0, divisor)
        micros = share.split(self.micro_rows)
        terms = [self.engine.forward_backward(m, scale=scale, last=m is micros[-1]) for m in micros]
        norm = self.engine.reduce_and_clip(config.train.clip_norm)
        take = torch.isfinite(norm).float()
        lr = learning_rate(step, config.optim, config.train.steps)
        self.engine.step(lr=lr, take=take)
        if config.train.ema_decay:
            self.engine.update_ema(averaging_decay(config.train.ema_decay, step), take=take)
        self.state.step += 1
        self.state.tokens += config.batch_rows * config.data.length
        self.window.add(
            flops=training_flops(
                self.model, num_sequences=self.rows_per_rank, length=config.data.length, num_rows=masked
            ),
            skipped=1.0 - take,
            latest=Latest(terms, norm, lr, scale, all_masked),
        )

    def _log(self) -> None:
        """Waits for the device once, sums the latest losses over the ranks, and tells the hooks."""
        self._count_skipped()
        window, latest = self.window, self.window.latest
        assert latest is not None
        loss, ce = self.mesh.sums.all_reduce(
            [sum(float(t.loss) for t in latest.terms), sum(float(t.cross_entropy) for t in latest.terms)]
        )
        latent = self._latent_report(latest.terms)
        seconds = window.seconds()
        record = StepRecord(
            step=self.state.step,
            loss=loss * latest.scale,
            ce=ce / max(1.0, latest.all_masked),
            grad_norm=float(latest.norm),
            lr=latest.lr,
            tokens=self.state.tokens,
            skipped=self.state.skipped,
            tokens_per_second=window.steps * self.config.batch_rows * self.config.data.length / seconds,
            mfu=None if self.peak_flops is None else window.flops / seconds / self.peak_flops,
            latent=latent,
        )
        self.window = Window()
        for hook in self.hooks:
            hook.on_log(record)

    def _latent_report(self, terms: Sequence[LossTerms]) -> LatentReport | None:
        sums = [t.latent_sums for t in terms if t.latent_sums is not None]
        if not sums:
            return None
        return latent_report(torch.tensor(self.mesh.sums.all_reduce(torch.stack(sums).sum(0).tolist())))

    def _count_skipped(self) -> None:
        self.state.skipped += int(self.window.skipped)
        self.window.skipped = self.window.skipped * 0

    def _validate(self) -> None:
        bound = validation_bound(self.engine, self.data, self.model, self.config)
        if bound.tokens == 0:
            return
        for hook in self.hooks:
            hook.on_validation(bound, self.state)

    def _save(self, kind: Kind = "permanent") -> None:
        self._count_skipped()
        self.saver.save(self.engine.state_dict(), self.state, kind)

    def _announce(self, path: Path, state: TrainState) -> None:
        for hook in self.hooks:
            hook.on_checkpoint(path, state)

    def _due(self, every: int) -> bool:
        last = self.state.step == self.config.train.steps
        return last or (every > 0 and self.state.step % every == 0)


def validation_bound(engine: Engine, data: Data, model: ModelConfig, config: RunConfig) -> Bound:
    """The bound on the first held-out rows, with the same noise every time, divided among the ranks."""
    sums = BoundSums()
    axis, length = engine.mesh.data, config.data.length
    source = data.validation
    wanted = min(config.validation.num_sequences, len(source)) if source is not None and config.validation.every else 0
    indices = torch.arange(axis.rank, wanted, axis.size)
    rows_at_once = max(1, (config.train.micro_batch_tokens or config.train.batch_tokens // axis.size) // length)
    num_rounds = math.ceil(math.ceil(wanted / axis.size) / rows_at_once)
    with engine.ema():
        for index_B in torch.tensor_split(indices, num_rounds) if num_rounds else ():
            assert source is not None
            filled = index_B if index_B.numel() else torch.zeros(1, dtype=torch.int64)
            batch = Batch.of({**source.gather(filled.numpy()), "index": filled})
            corruption = corrupt_uniform_count(batch, NoiseKey(config.seed, 0, filled), model)
            terms = engine.evaluate(Micro(batch, corruption, StepSchedule()))
            if index_B.numel():
                sums.add(terms.loss_B, batch.maskable_BL.sum(1))
    return BoundSums(*engine.mesh.sums.all_reduce(sums.as_list())).estimate(model.objective)


def run_identity(config: RunConfig, data: Data) -> dict[str, object]:
    """What decides noise and data order besides the step; a checkpoint continues only a run that shares it."""
    frozen = {"train.freeze": list(config.train.freeze)} if config.train.freeze else {}
    return {
        **frozen,
        "seed": config.seed,
        "train.batch_tokens": config.train.batch_tokens,
        "data.length": config.data.length,
        "data.rows": len(data.train),
        "data.tokenizer": data.tokenizer.sha256(),
    }


def averaging_decay(decay: float, step: int) -> float:
    """Young averages forget faster: (1 + step) / (10 + step), up to the decay asked for."""
    return min(decay, (1 + step) / (10 + step))


def _divide(config: RunConfig, size: int) -> int:
    """Rows of the batch that each rank takes."""
    rows = config.batch_rows
    if rows % size:
        legal = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(
            f"a batch of {rows} rows (train.batch_tokens / data.length) does not divide among {size} processes: "
            f"use one of {legal} processes, or change train.batch_tokens"
        )
    return rows // size
