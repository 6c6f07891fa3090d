"""What a run is: typed, frozen settings, and what is wrong across them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config import ModelConfig, Settings, TransformerConfig

from .data_config import DataConfig, ToyFunctionsData


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """AdamW and its learning rate."""

    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant; a cosine to min_lr_ratio; or warm-up, stable, then a linear decay (WSD)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """Share of the steps that WSD spends decaying."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a fraction of the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms and biases have none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Steps, batches, precision, clipping, averaging."""

    steps: int = 1000
    """Optimizer steps."""
    batch_tokens: int = 8192
    """Tokens per optimizer step over all ranks, a multiple of data.length."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass on a rank; default: the rank's whole share of the batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 and keeps weights, moments and reductions in float32."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """Kernel. auto: sdpa; on an NVIDIA GPU flash for documents in bf16, flex for blocks."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing of every block; selective: of what is cheap to compute again, not of products."""
    compile: bool = False
    """torch.compile of every block."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights; 0: none."""
    freeze: tuple[str, ...] = ()
    """Patterns (regular expressions) of parameter names that are not trained, such as denoiser\\..*"""
    kl_weight: float = 1.0
    """Weight of a latent's KL at the end of its annealing (1 is VADD's DELBO)."""
    kl_anneal_steps: int = 0
    """Steps over which that weight grows linearly from 0; without annealing a latent tends to collapse."""
    kl_hold_steps: int = 0
    """Steps before that, at its first step's weight: where much is hidden, a latent is first used, then made cheap."""
    attention_anneal: Literal["at_once", "bernoulli", "window"] = "at_once"
    """How the attention of causal weights opens: to everything, to later positions by chance, or nearest first."""
    attention_anneal_steps: int = 0
    """Steps over which it opens linearly, where it does not at once."""
    on_spike: Literal["skip", "rollback", "stop"] = "skip"
    """A spike: leave its update out; go back to the newest checkpoint and on after its data; end with exit code 70."""
    spike_factor: float = 0.0
    """A gradient norm above so many times its recent average is a spike; 0: only NaN and infinity are."""
    time_limit_minutes: float = 0.0
    """Minutes after which the run saves and ends with exit code 75, as after SIGTERM; 0: none."""
    watchdog_minutes: float = 30.0
    """Minutes without a step after which a process writes its stacks to RUN/stalls and ends, with code 71; 0: never."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Settings):
    """How replicate x shard x context x tensor processes divide the work; the shard axis takes what is left."""

    replicate: int = 1
    """Groups of processes that hold a whole model each (HSDP); with as many groups as processes nothing is sharded."""
    tensor: int = 1
    """Processes that divide every matrix among them (tensor parallel); with fsdp, the positions in between too."""
    context: int = 1
    """Processes that divide the positions of a row among them (context parallel)."""
    zero_stage: Literal[1, 2, 3] = 3
    """With engine=deepspeed, what processes shard: optimizer state (1), gradients too (2), weights too (3)."""
    offload: bool = False
    """Keep optimizer state and float32 weights in host memory; with fsdp, where there are no others, all weights."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name in ("replicate", "tensor", "context"):
            if getattr(self, name) < 1:
                yield f"parallel.{name}={getattr(self, name)} must be at least 1"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Settings):
    """When the bound is measured, and on how much."""

    every: int = 250
    """Steps between validations; the last step always validates. 0: never."""
    num_sequences: int = 64
    """Held-out rows, the same ones with the same noise every time."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """When to save, and what to keep."""

    every: int = 500
    """Steps between checkpoints; the last step always saves. 0: only at the end."""
    keep: int = 2
    """Newest of them that are kept."""
    keep_every: int = 0
    """Steps, a multiple of checkpoint.every, whose checkpoints are never removed. 0: none."""
    ephemeral_minutes: float = 0
    """Minutes after which an ephemeral one is saved in between, which goes when a newer one is sealed. 0: none."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy in host memory."""
    export_every: int = 0
    """Steps, a multiple of checkpoint.every, exported for transformers to RUN/exports, the last one too. 0: none."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        leasts = (("keep", 1), ("every", 0), ("keep_every", 0), ("export_every", 0), ("ephemeral_minutes", 0))
        for name, least in leasts:
            if not getattr(self, name) >= least:
                yield f"checkpoint.{name}={getattr(self, name)} must be at least {least}"
        for name in ("keep_every", "export_every"):
            steps = getattr(self, name)
            if steps > 0 and (self.every < 1 or steps % self.every):
                yield (
                    f"checkpoint.{name}={steps} is not a multiple of checkpoint.every={self.every}, "
                    "so most of these steps would have no checkpoint: change one of them"
                )


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings):
    """Where the numbers go; metrics.jsonl is always written."""

    every: int = 10
    """Steps between lines."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (WANDB_MODE=offline works)."""
    tensorboard: bool = False
    """Also write TensorBoard's files to RUN/tensorboard."""
    profile_steps: tuple[int, ...] = ()
    """Steps, counted from 1, that PyTorch's profiler traces on rank 0, to RUN/profiles."""
    memory_snapshot: int = 0
    """The step after which every GPU's allocations since the start are written to RUN/profiles; 0: never."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """A run. The same RunConfig on the same machine gives the same losses, bit for bit."""

    name: str
    """Name of the run; its folder is runs/NAME unless `folder` is set."""
    folder: str = ""
    """Where checkpoints, metrics and reports go. Default: runs/NAME."""
    seed: int = 0
    """Seeds initial weights, data order and noise."""
    init_from: str = ""
    """Start with the weights of this run or checkpoint, by name; what it does not have starts as usual."""
    data: DataConfig
    """What it trains on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is optimised."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    engine: Literal["fsdp", "deepspeed", "megatron"] = "fsdp"
    """FSDP2; DeepSpeed's ZeRO; or Megatron-core's tensor parallel layers, with data parallel around them."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several processes divide the work."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The bound on held-out rows during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder or f"runs/{self.name}")

    @property
    def batch_rows(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return self.train.batch_tokens // self.data.length

    def problems(self) -> Iterator[str]:
        """What is wrong across settings, one sentence each."""
        if self.name in ("", ".", "..") or set(self.name) & {"/", "\\"}:
            yield f"name={self.name!r} must be one name without separators: set folder=... for another place"
        yield from (f"model.{problem}" for problem in self.model.problems())
        yield from (f"model.{problem}" for problem in self.model.length_problems(self.data.length))
        if isinstance(self.data, ToyFunctionsData):
            yield from self.data.problems()
        yield from self.parallel.problems()
        yield from self.checkpoint.problems()
        yield from self._engine_problems()
        length, train = self.data.length, self.train
        if length < 1 or train.batch_tokens < length or train.batch_tokens % length:
            nearest = max(1, round(train.batch_tokens / max(1, length))) * max(1, length)
            yield (
                f"train.batch_tokens={train.batch_tokens} is not a positive multiple of data.length={length}: "
                f"the nearest is {nearest}"
            )
        micro = train.micro_batch_tokens
        if micro is not None and (micro < length or micro % length):
            yield f"train.micro_batch_tokens={micro} is not a positive multiple of data.length={length}"
        yield from self._freeze_problems()
        yield from self._annealing_problems()
        if not 0 <= train.ema_decay < 1:
            yield f"train.ema_decay={train.ema_decay} must lie in [0, 1); 0 turns it off"
        if 0 < train.spike_factor <= 1:
            yield f"train.spike_factor={train.spike_factor} must be more than 1, such as 5; 0 turns it off"
        for name in ("decay_fraction", "min_lr_ratio"):
            if not 0 <= getattr(self.optim, name) <= 1:
                yield f"optim.{name}={getattr(self.optim, name)} must lie in [0, 1]"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self.optim, name) < 1:
                yield f"optim.{name}={getattr(self.optim, name)} must lie in [0, 1)"
        for name, value, least in (
            ("optim.lr", self.optim.lr, 0),
            ("optim.eps", self.optim.eps, 0),
            ("optim.weight_decay", self.optim.weight_decay, 0),
            ("optim.warmup_steps", self.optim.warmup_steps, 0),
            ("validation.num_sequences", self.validation.num_sequences, 1),
            ("train.steps", train.steps, 1),
            ("train.clip_norm", train.clip_norm, 1e-12),
            ("train.kl_weight", train.kl_weight, 0),
            ("train.kl_anneal_steps", train.kl_anneal_steps, 0),
            ("train.kl_hold_steps", train.kl_hold_steps, 0),
            ("train.attention_anneal_steps", train.attention_anneal_steps, 0),
            ("train.spike_factor", train.spike_factor, 0),
            ("train.time_limit_minutes", train.time_limit_minutes, 0),
            ("train.watchdog_minutes", train.watchdog_minutes, 0),
            ("log.every", self.log.every, 1),
            ("log.profile_steps", min(self.log.profile_steps, default=1), 1),
            ("log.memory_snapshot", self.log.memory_snapshot, 0),
            ("validation.every", self.validation.every, 0),
            ("data.num_workers", self.data.num_workers, 0),
        ):
            if not value >= least:
                yield f"{name}={value} must be at least {least}"

    def _engine_problems(self) -> Iterator[str]:
        """What the engine does not do."""
        legal: dict[str, Any] = {"parallel.zero_stage": 3}
        if self.engine == "deepspeed":
            legal = {"parallel.replicate": 1, "parallel.tensor": 1, "parallel.context": 1}
            if self.parallel.zero_stage == 3 and self.train.compile:
                yield (
                    "train.compile=True gains nothing with parallel.zero_stage=3, which breaks every compiled block at "
                    "every matrix: set train.compile=false, parallel.zero_stage=2, or engine=fsdp"
                )
        elif self.engine == "megatron":
            legal |= {"parallel.replicate": 1, "parallel.context": 1, "parallel.offload": False, "train.compile": False}
        else:
            yield from self._division_problems()
        for key, wanted in legal.items():
            group, name = key.split(".")
            if (value := getattr(getattr(self, group), name)) != wanted:
                other = "deepspeed" if name == "zero_stage" else "fsdp"
                said, right = str(value).lower(), str(wanted).lower()
                yield f"{key}={said} does not go with engine={self.engine}: set {key}={right}, or engine={other}"

    def _division_problems(self) -> Iterator[str]:
        """Positions that do not divide; blocks are read in two streams, which are divided as one."""
        context, tensor, length = self.parallel.context, self.parallel.tensor, self.data.length
        positions = 2 * length if self.model.block_size else length
        if context * tensor > 1 and positions % (context * tensor):
            yield (
                f"data.length={length} does not divide among parallel.context={context} x parallel.tensor={tensor} "
                f"processes: use a multiple of {context * tensor}, or smaller axes"
            )

    def _annealing_problems(self) -> Iterator[str]:
        """A weight that is held and never rises; attention that can not open by and by."""
        train, model = self.train, self.model
        if train.kl_hold_steps > 0 and not train.kl_anneal_steps:
            yield (
                f"train.kl_hold_steps={train.kl_hold_steps} has no use with train.kl_anneal_steps=0: set both, or "
                "leave it out"
            )
        name = f"train.attention_anneal={train.attention_anneal}"
        if train.attention_anneal == "at_once":
            if train.attention_anneal_steps:
                yield (
                    f"train.attention_anneal_steps={train.attention_anneal_steps} has no use with {name}: "
                    "set train.attention_anneal=bernoulli or window, or leave the steps out"
                )
            return
        if not 0 < train.attention_anneal_steps <= train.steps:
            yield (
                f"{name} needs train.attention_anneal_steps of 1 to train.steps={train.steps}, at whose end attention "
                f"has opened, such as a tenth; it is {train.attention_anneal_steps}"
            )
        for has, what in (
            (model.block_size, f"model.block_size={model.block_size}, whose attention is causal by blocks"),
            (model.autoregressive, "model.autoregressive=True, whose attention stays causal"),
            (not isinstance(model.backbone, TransformerConfig), "a backbone without attention"),
            (train.attention == "flash", "train.attention=flash, which has no such mask (flex and sdpa do)"),
        ):
            if has:
                yield f"{name} does not go with {what}: set train.attention_anneal=at_once, or change that"

    def _freeze_problems(self) -> Iterator[str]:
        for pattern in self.train.freeze:
            try:
                matches_projection = re.fullmatch(pattern, "augmentation.projection.weight")
            except re.error as error:
                yield f"train.freeze: {pattern!r} is not a regular expression ({error}), as denoiser\\..* is"
                continue
            augmentation = self.model.augmentation
            if matches_projection and augmentation is not None and augmentation.fusion == "concat":
                yield (
                    f"train.freeze: {pattern!r} freezes the projection of augmentation.fusion=concat, which starts by "
                    "passing no hint: leave it out, for example denoiser\\..*"
                )
