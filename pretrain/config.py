"""What a run is: typed, frozen settings, dotted overrides, and validation that lists every problem at once."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from model.config import BackboneConfig, ModelConfig, Settings, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Settings):
    """How to make the shards when they are not there: what `penumbra tokenize` takes."""

    source: str
    """A folder, a .txt, .py or .jsonl file, or `stdlib`."""
    tokenizer: str = "bpe:4096"
    """bytes, characters, bpe:SIZE, or a tokenizer.json."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by their hash."""


@dataclass(frozen=True, kw_only=True)
class ShardData(Settings):
    """Tokenised documents on disk."""

    kind: Literal["shards"] = "shards"
    """Rows from Megatron shards."""
    path: str
    """Folder written by `penumbra tokenize`."""
    length: int = 256
    """Positions per row, L."""
    pack: Literal["concat", "pad"] = "concat"
    """concat: rows are cut from the stream of documents; pad: one document per row."""
    num_workers: int = 1
    """Prefetching processes per rank; 0 loads in the training process."""
    prepare: PrepareConfig | None = None
    """Makes the shards on first use."""


@dataclass(frozen=True, kw_only=True)
class ToyFunctionsData(Settings):
    """Small Python functions from a generator; only their bodies are masked."""

    kind: Literal["toy_functions"] = "toy_functions"
    """Rows from the generator."""
    length: int = 96
    """Positions per row, L: prompt, body, and end tokens up to L."""
    num_trees: int = 12_000
    """Distinct syntax trees, held-out ones included."""
    num_held_out: int = 400
    """Trees kept for evaluation, none of which occurs in training."""
    variants: int = 4
    """Functions per training tree, with other names and constants."""
    vocab_size: int = 1024
    """Size of the byte-level BPE trained on the training functions."""
    seed: int = 0
    """Seed of the generator."""
    num_workers: int = 1
    """Prefetching processes per rank; 0 loads in the training process."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name, least in (("num_trees", 2), ("variants", 1), ("vocab_size", 259)):
            if getattr(self, name) < least:
                yield f"data.{name}={getattr(self, name)} must be at least {least}"
        most = self.num_trees - 1
        if most > 0 and not 1 <= self.num_held_out <= most:
            yield f"data.num_held_out={self.num_held_out} must lie between 1 and {most} (data.num_trees - 1)"


@dataclass(frozen=True, kw_only=True)
class PatternData(Settings):
    """Rows from a small set of digit patterns whose probabilities are known (VMD Sections 4.1, 4.2, Appendix D.2)."""

    kind: Literal["patterns"] = "patterns"
    """Rows from a known set of patterns."""
    toy: Literal["deterministic", "non_uniform", "dependence", "d1", "d2", "needle"] = "deterministic"
    """Pairs (k, k+1), uniform, non-uniform or dependent with probability `dependence`; four tokens; a needle."""
    length: int = 2
    """Positions per row, L: 2, 4, or for the needle at least 8."""
    dependence: float | None = None
    """With toy=dependence: the probability that the second digit follows the first."""
    num_rows: int = 1_000_000
    """Rows, each drawn anew from the distribution."""
    num_workers: int = 0
    """Prefetching processes per rank; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class PointData(Settings):
    """Points of the plane in 100 bins per dimension (VADD Appendix B.1)."""

    kind: Literal["points"] = "points"
    """Points of the plane."""
    toy: Literal["checkerboard", "swissroll", "circles"] = "checkerboard"
    """Which distribution."""
    num_rows: int = 100_000
    """Size of the training set."""
    num_workers: int = 0
    """Prefetching processes per rank; 0 loads in the training process."""

    @property
    def length(self) -> int:
        """Positions per row, L: two dimensions."""
        return 2


@dataclass(frozen=True, kw_only=True)
class SudokuData(Settings):
    """Sudoku grids whose clues are visible and whose other cells are masked."""

    kind: Literal["sudoku"] = "sudoku"
    """Sudoku grids."""
    size: Literal[4, 6] = 4
    """Cells of a row, column and box."""
    family: Literal["unique", "few_clues"] = "unique"
    """Puzzles with one solution, or with so few clues that there are many."""
    num_rows: int = 100_000
    """Training puzzles."""
    num_workers: int = 0
    """Prefetching processes per rank; 0 loads in the training process."""

    @property
    def length(self) -> int:
        """Positions per row, L: the cells."""
        return self.size**2


DataConfig = Annotated[ShardData | ToyFunctionsData | PatternData | PointData | SudokuData, Field(discriminator="kind")]


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
        """Attention that can not open by and by."""
        train, model = self.train, self.model
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


def validate(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from nested dictionaries and `dotted.key=value` overrides.

    Raises:
        ValueError: lists every unknown key (with the nearest real one), wrong type and inconsistency.
    """
    merged = _deep_copy(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not an override: write dotted.key=value, for example optim.lr=3e-4")
        _assign(merged, key, _parse(override, value))
    try:
        config = _adapter().validate_python(merged)
    except ValidationError as error:
        sentences = [_explain(item, merged) for item in error.errors()]
        raise ValueError(_join(list(dict.fromkeys(s for s in sentences if s)))) from None
    problems = list(config.problems())
    if problems:
        raise ValueError(_join(problems))
    return config


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    """Takes longer to build than to use."""
    return TypeAdapter(RunConfig)


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a config.yaml saved beside a run."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} can not be read as YAML ({reason}): pass the config.yaml of a run") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings: pass the config.yaml of a run")
    return validate(tree, overrides)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def known_keys(kinds: Mapping[str, str], settings: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that an override may set, where groups of several kinds (data, model.backbone) have these."""
    for f in fields(settings):
        key = f"{prefix}{f.name}"
        for group in [KINDS[key][kinds[key]]] if key in KINDS else _dataclasses_of(f.type):
            yield from known_keys(kinds, group, f"{key}.")
        yield key


def _dataclasses_of(annotation: Any) -> list[type]:
    if is_dataclass(annotation):
        return [annotation]  # type: ignore[list-item]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _dataclasses_of(part)]


KINDS: dict[str, dict[str, type]] = {
    path: {group.kind: group for group in _dataclasses_of(union)}  # type: ignore[attr-defined]
    for path, union in (("data", DataConfig), ("model.backbone", BackboneConfig))
}
"""Groups of settings that come in several kinds, the default one first."""


def _deep_copy(tree: Any) -> Any:
    return {k: _deep_copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _parse(override: str, value: str) -> Any:
    try:
        return yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise ValueError(f"{override!r} has a value that is not YAML: quote it, or close its brackets") from None


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def _explain(error: Any, tree: Mapping[str, Any]) -> str | None:
    """One sentence; None for what pydantic says about a kind of a group that was not meant."""
    parts = [str(part) for part in error["loc"]]
    kinds = {path: _kind(tree, path) for path in KINDS}
    for path, groups in KINDS.items():
        depth = path.count(".") + 1
        if ".".join(parts[:depth]) != path:
            continue
        if kinds[path] not in list(groups):
            return f"{path}.kind={kinds[path]!r} is not one of {', '.join(groups)}"
        if len(parts) > depth and parts.pop(depth) not in (kinds[path], groups[kinds[path]].__name__):
            return None
    key = ".".join(parts)
    if error["type"] == "unexpected_keyword_argument":
        legal = {path: kind if kind in list(KINDS[path]) else next(iter(KINDS[path])) for path, kind in kinds.items()}
        return _explain_unknown(key, legal, is_group=isinstance(error["input"], Mapping))
    if error["type"] == "union_tag_not_found":
        return f"{key}.kind is missing: set it to one of {', '.join(KINDS[key])}"
    given = "" if isinstance(error["input"], Mapping) else f"={error['input']!r}"
    if error["type"] in ("dataclass_type", "model_attributes_type"):
        return f"{key}{given}: {key} is a group of settings, write {key}.KEY=VALUE"
    return f"{key}{given}: {error['msg'][0].lower()}{error['msg'][1:].replace('tuple', 'list')}"


def _kind(tree: Any, path: str) -> Any:
    """The kind that the settings give to a group, the default one where they give none."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    default = next(iter(KINDS[path]))
    return tree.get("kind", default) if isinstance(tree, Mapping) else default


def _explain_unknown(key: str, kinds: Mapping[str, str], *, is_group: bool) -> str:
    for path, groups in KINDS.items():
        if key in {k for kind in groups for k in known_keys({**kinds, path: kind})}:
            return f"{key} is not a setting of {path}.kind={kinds[path]}"
    keys = list(known_keys(kinds))
    groups_of = {k.rpartition(".")[0] for k in keys}
    alike = [k for k in keys if (k in groups_of) == is_group]
    return f"{key} is not a setting: did you mean {_nearest(key, alike)}?"


def _nearest(key: str, keys: list[str]) -> str:
    """The key whose last part is the same, is much like it, or is least unlike it; of the same parent first."""
    parent, _, leaf = key.rpartition(".")
    below = [k for k in keys if k.startswith(f"{parent}.")]
    siblings = [k for k in below if k.rpartition(".")[0] == parent]
    for candidates, cutoff in ((below, 1.0), (keys, 1.0), (siblings, 0.6), (keys, 0.6), (siblings, 0.0), (keys, 0.0)):
        by_leaf = {k.rpartition(".")[2]: k for k in reversed(candidates)}
        if found := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff):
            return by_leaf[found[0]]
    return keys[0]


def _join(problems: list[str]) -> str:
    return (
        problems[0] if len(problems) == 1 else "\n".join(["the settings have problems:", *(f"- {p}" for p in problems)])
    )
