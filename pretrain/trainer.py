"""The loop, and only the loop: data order, noise keys, learning rate, skip decision, hooks, checkpoint timing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.loader import Loader
from data_pipeline.order import Order
from model.batch import Batch
from model.collapse import LatentReport, latent_report
from model.config import ModelConfig
from model.corruption import corrupt
from model.diffusion import LossTerms, StepSchedule
from model.flops import training_flops
from model.noise import NoiseKey

from .checkpoint.agreement import on_first_rank
from .checkpoint.load import CHECKPOINTS, initialise_from, resume, resume_point
from .checkpoint.manifest import Kind
from .checkpoint.retention import abandon_after
from .checkpoint.saver import Saver
from .config import RunConfig
from .data import Data
from .endings import Ending
from .engines.base import Engine, Micro
from .hooks.base import Hook, StepRecord, tell
from .hooks.signals import Stopped, StopRequest
from .hooks.spans import Spans
from .hooks.spikes import Spiked, SpikeGuard
from .identity import rows_per_rank, run_identity
from .memory import peak_memory
from .rollback import rollback_target
from .schedules import averaging_decay, learning_rate, step_schedule
from .state import TrainState
from .validation import validation_bound
from .window import Latest, Window


def corrupt_step(
    position: int, rows: dict[str, Tensor], *, model: ModelConfig, seed: int, schedule: Callable[[int], StepSchedule]
) -> Micro:
    """A rank's rows of one batch, corrupted; runs ahead of the loop in a loader's worker.

    position: of the batch in the data order, from which its noise comes too; it is the step until a rollback.
    """
    batch = Batch.of(rows)
    return Micro(batch, corrupt(batch, NoiseKey(seed, position, batch.index_B), model), schedule(position))


@dataclass
class Trainer:
    """One run: its configuration, its engine and data, the hooks that watch it, and what may ask it to stop."""

    config: RunConfig
    model: ModelConfig
    engine: Engine
    data: Data
    hooks: Sequence[Hook]
    peak_flops: float | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    spans: Spans | None = None

    def __post_init__(self) -> None:
        self.mesh = self.engine.mesh
        self.state = TrainState(identity=run_identity(self.config, self.data))
        self.window = Window()
        self.span = self.engine.span = self.spans or Spans(self.mesh.device)
        self.spikes = SpikeGuard(self.config.train)
        self.saved: int | None = None
        self.ranks_per_row = self.mesh.world.size // self.mesh.data.size
        self.rows_per_rank = rows_per_rank(self.config, self.mesh)
        micro_tokens = self.config.train.micro_batch_tokens
        micro_rows = self.rows_per_rank if micro_tokens is None else micro_tokens // self.config.data.length
        self.micro_rows = min(micro_rows, self.rows_per_rank)

    def run(self) -> Ending:
        """Trains from the newest good checkpoint (or from nothing) to the last step, or to where it is stopped."""
        try:
            with Saver(
                self.config.path / CHECKPOINTS,
                self.config.checkpoint,
                self.model,
                self.mesh,
                save_tokenizer=self.data.tokenizer.save,
                on_sealed=self._announce,
            ) as self.saver:
                return self._run()
        except BaseException as error:
            failure = error
            self._tell(lambda hook: hook.on_error(failure))
            raise

    def _run(self) -> Ending:
        ending, reason = Ending.FINISHED, ""
        try:
            self._start()
            self._train()
        except Stopped as stopped:
            ending, reason = Ending.SAVED, stopped.reason
        except Spiked as spiked:
            ending, reason = Ending.SPIKED, str(spiked)
        if ending is Ending.SAVED and self.saved != self.state.step:
            self._save("permanent" if self._due(self.config.checkpoint.every) else "ephemeral")
        self.saver.finish()
        if ending is Ending.FINISHED:
            self._tell(lambda hook: hook.on_finish(self.state))
        else:
            self._tell(lambda hook: hook.on_stop(self.state, reason))
        return ending

    def _start(self) -> None:
        checkpoint = resume_point(self.config.path / CHECKPOINTS, self.mesh.world)
        if checkpoint is not None:
            self._resume(checkpoint)
            self.state.resumes += self.state.step < self.config.train.steps
        elif self.config.init_from:
            taken = initialise_from(Path(self.config.init_from), self.engine, self.data.tokenizer)
            if self.mesh.world.rank == 0:
                print(taken, flush=True)
        self._tell(lambda hook: hook.on_start(self.state, resumed=checkpoint is not None))

    def _train(self) -> None:
        """From where the state stands to the last step."""
        if self.state.owes_validation:
            self._validate()
        while self.state.step < self.config.train.steps:
            self.window = Window()
            with closing(iter(self._batches())) as batches:
                self._train_on(batches)

    def _train_on(self, batches: Iterator[Micro]) -> None:
        """To the last step, or until a spike has sent the run back, and other batches are due."""
        while self.state.step < self.config.train.steps:
            with self.span("data_wait"):
                share = next(batches)
            with self.span("rank_wait"):
                divisor, all_masked = self._agree([share.corruption.divisor, share.corruption.num_masked])
            taken = self._step(share, divisor=divisor, all_masked=all_masked)
            if self.spikes.needs_host() and not taken and self._answer_spike():
                return
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

    def _batches(self) -> Loader[Micro]:
        passed_over = self.state.num_passed_over
        return Loader(
            self.data.train,
            Order(len(self.data.train), self.config.seed),
            global_batch=self.config.batch_rows,
            rank=self.mesh.data.rank,
            size=self.mesh.data.size,
            first_step=self.state.next_batch,
            num_steps=self.config.train.steps + passed_over,
            num_workers=self.config.data.num_workers,
            transform=partial(
                corrupt_step,
                model=self.model,
                seed=self.config.seed,
                schedule=partial(step_schedule, config=self.config, passed_over=passed_over),
            ),
            pin_memory=self.mesh.device.type == "cuda",
        )

    def _agree(self, counts: Sequence[float] = ()) -> list[float]:
        """Counts summed over the batch; raises Stopped on every rank where any of them was asked to stop.

        One sum over all ranks on the host: those that share rows repeat their counts.
        """
        world = self.mesh.world
        totals = world.all_reduce([*counts, *self.stop.votes()])
        self._tell(lambda hook: hook.on_alive())
        self.stop.decide(totals[len(counts) :])
        return [total / self.ranks_per_row for total in totals[: len(counts)]]

    def _step(self, share: Micro, *, divisor: float, all_masked: float) -> Tensor:
        """One optimizer step; nothing here waits for the device. Returns 1 where the update was taken, else 0."""
        config, step = self.config, self.state.step
        self._tell(lambda hook: hook.on_step_start(step + 1))
        scale = 1.0 / max(1.0, divisor)
        micros = share.split(self.micro_rows)
        terms = [self.engine.forward_backward(m, scale=scale, last=m is micros[-1]) for m in micros]
        with self.span("reduce"):
            norm = self.engine.reduce_and_clip(config.train.clip_norm)
        with self.span("optimizer"):
            take = self.spikes.judge(norm)
            lr = learning_rate(step, config.optim, config.train.steps)
            self.engine.step(lr=lr, take=take)
            if config.train.ema_decay:
                self.engine.update_ema(averaging_decay(config.train.ema_decay, step), take=take)
        self.state.step += 1
        self.state.tokens += config.batch_rows * config.data.length
        flops = training_flops(
            self.model,
            num_sequences=self.rows_per_rank,
            length=config.data.length,
            num_rows=share.corruption.num_masked,
        )
        latest = Latest(terms, norm, lr, scale, all_masked)
        self.window.add(flops=flops / self.ranks_per_row, skipped=1.0 - take, latest=latest)
        self._tell(lambda hook: hook.on_step_end(step + 1))
        return take

    def _answer_spike(self) -> bool:
        """Whether the run has gone back to a checkpoint, to go on after the data of the spike.

        Raises:
            Spiked: it ends here.
        """
        spike, end, rollbacks = self.state.step, self.state.next_batch, self.state.rollbacks
        if self.config.train.on_spike == "stop":
            assert self.window.latest is not None
            raise Spiked(f"a spike in the gradient of step {spike}, norm {float(self.window.latest.norm):.4g}")
        self.saver.wait()
        checkpoint = rollback_target(self.config, self.mesh.world)
        if checkpoint is None:
            return False
        self._resume(checkpoint)
        on_first_rank(self.mesh.world, lambda: abandon_after(checkpoint))
        self.spikes.count_return(self.state.step)
        self.state.passed_over.append((self.state.next_batch, end))
        self.state.rollbacks = rollbacks + 1
        self._tell(lambda hook: hook.on_rollback(self.state, spike=spike))
        return True

    def _resume(self, checkpoint: Path) -> None:
        self.state = resume(checkpoint, self.engine, self.model, self.state.identity)
        self.spikes.load(self.state)
        self.saved = self.state.step

    def _log(self) -> None:
        """Waits for the device once, sums the latest losses over the ranks, and tells the hooks."""
        self._keep_books()
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
            peak_memory=peak_memory(self.mesh.device),
        )
        self.window = Window()
        with self.span("log"):
            self._tell(lambda hook: hook.on_log(record))

    def _latent_report(self, terms: Sequence[LossTerms]) -> LatentReport | None:
        sums = [t.latent_sums for t in terms if t.latent_sums is not None]
        if not sums:
            return None
        return latent_report(torch.tensor(self.mesh.sums.all_reduce(torch.stack(sums).sum(0).tolist())))

    def _keep_books(self) -> None:
        """What the state says of steps that the device alone knew about; waits for it."""
        self.state.skipped += self.window.take_skipped()
        self.spikes.save(self.state)

    def _validate(self) -> None:
        self.state.owes_validation = True
        with self.span("validation"):
            bound = validation_bound(self.engine, self.data, self.model, self.config, between=self._agree)
        self.state.owes_validation = False
        if bound.tokens:
            self._tell(lambda hook: hook.on_validation(bound, self.state))

    def _save(self, kind: Kind = "permanent") -> None:
        self._keep_books()
        with self.span("save"):
            self.saver.save(self.engine.state_dict(), self.state, kind)
        self.saved = self.state.step

    def _announce(self, path: Path, state: TrainState) -> None:
        self._tell(lambda hook: hook.on_checkpoint(path, state))

    def _tell(self, event: Callable[[Hook], None]) -> None:
        tell(self.hooks, event)

    def _due(self, every: int) -> bool:
        return self.state.step == self.config.train.steps or (every > 0 and self.state.step % every == 0)
