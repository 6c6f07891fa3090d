"""What a model is: everything a sampler needs travels here, inside the checkpoint.

Plain frozen dataclasses without behaviour beyond their own consistency, so that old checkpoints load when the run
configuration changes and a Hugging Face export can carry this file alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal


class Settings:
    """Base of all settings: whoever validates them (pydantic) refuses keys that are not fields."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """How fast positions are masked: x_t is masked with probability 1 - alpha(t)."""

    kind: Literal["linear", "cosine", "polynomial", "geometric"] = "linear"
    """linear 1 - t; cosine 1 - cos(pi/2 (1 - t)); polynomial 1 - t^power; geometric exp(-beta_min^(1-t) beta_max^t)."""
    power: float = 2.0
    """Exponent of the polynomial schedule; at 1/2 and below, rare times near 0 weigh so much in the bound that they are
    most of the loss's variance (loss_weight=uniform weighs all the same)."""
    beta_min: float = 1e-5
    """Total noise at t = 0 of the geometric schedule."""
    beta_max: float = 20.0
    """Total noise at t = 1 of the geometric schedule."""
    t_min: float = 1e-3
    """Smallest time drawn in training; bounds need none."""
    t_max: float = 1.0
    """Largest time drawn in training; below 1 with t_min above 0 it is BD3-LM's clipped interval."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        if not 0 <= self.t_min < self.t_max <= 1:
            yield f"schedule.t_min={self.t_min}, t_max={self.t_max} must satisfy 0 <= t_min < t_max <= 1, as 0.001, 1"
        if not self.power > 0:
            yield f"schedule.power={self.power} must be positive, for example 2"
        if not 0 < self.beta_min < self.beta_max:
            yield f"schedule.beta_min={self.beta_min} must lie between 0 and beta_max={self.beta_max}"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Settings):
    """A DiT (layernorm, gelu, conditioning) or a Qwen2/Llama decoder (rmsnorm, swiglu, grouped queries)."""

    kind: Literal["transformer"] = "transformer"
    """The denoiser's architecture."""
    dim: int = 256
    """Width of the residual stream, D."""
    num_layers: int = 6
    """Number of blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; fewer than num_heads is grouped-query attention. Default: num_heads."""
    head_dim: int | None = None
    """Width of a head. Default: dim / num_heads."""
    ffn_dim: int | None = None
    """Inner width of the feed-forward layer. Default: 4 dim (gelu), 8/3 dim rounded up to 64 (swiglu)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before every sublayer and before the head."""
    ffn: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward layer."""
    norm_eps: float = 1e-6
    """Added to the variance."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    tie_embeddings: bool = False
    """Use the embedding table as the head."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    max_positions: int = 0
    """Rows of a learned position table beside the rotary positions, with which alone fully masked places look alike."""
    condition_dim: int = 0
    """Width of the vector (time, latent) that modulates every block by adaLN-zero; 0: no conditioning."""
    modulation: Literal["per_block", "shared"] = "per_block"
    """One adaLN projection in each block, or one that all blocks share."""
    gates: Literal["zero", "one", "none"] = "zero"
    """Gates of conditioned blocks: zero (adaLN-zero), one (they start open, equal to an unconditioned parent), none."""
    dropout: float = 0.0
    """Probability of zeroing an output of attention or feed-forward in training, counter-based."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def num_modulated(self) -> int:
        """Vectors of width dim that modulate a block: shift, scale (and gate) of two sublayers."""
        return 4 if self.gates == "none" else 6

    @property
    def affine(self) -> bool:
        """Whether norms have a scale and shift of their own."""
        return self.condition_dim == 0 or self.gates != "zero"

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layer."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return 4 * self.dim if self.ffn == "gelu" else -(-8 * self.dim // (3 * 64)) * 64

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"backbone.{name}={value} must be at least 1"
                return
        if self.head_dim is None and self.dim % self.num_heads:
            divisors = [n for n in range(1, self.dim + 1) if self.dim % n == 0 and (self.dim // n) % 2 == 0]
            fix = f"use one of {divisors} or set head_dim" if divisors else "use an even dim or set head_dim"
            yield f"backbone.num_heads={self.num_heads} does not divide dim={self.dim}: {fix}"
        elif self.head_width % 2:
            yield f"backbone.head_dim={self.head_width} must be even for rotary positions"
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            yield f"backbone.num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}: one of {divisors}"
        if not self.norm_eps >= 0:
            yield f"backbone.norm_eps={self.norm_eps} must be 0 or positive, for example 1e-6"
        if not self.rope_theta > 0:
            yield f"backbone.rope_theta={self.rope_theta} must be positive, for example 10000"
        if not 0 <= self.dropout < 1:
            yield f"backbone.dropout={self.dropout} must lie in [0, 1)"
        if self.max_positions < 0:
            yield f"backbone.max_positions={self.max_positions} must be 0 (rotary positions alone) or positive"
        if self.condition_dim < 0:
            yield f"backbone.condition_dim={self.condition_dim} must be 0 (off) or positive"


@dataclass(frozen=True, kw_only=True)
class PointMlpConfig(Settings):
    """A perceptron over a few categorical dimensions at once (VADD B.1): the 2D toys."""

    kind: Literal["point_mlp"] = "point_mlp"
    """The denoiser's architecture."""
    dim: int = 512
    """Width of embeddings and hidden layers, D."""
    num_layers: int = 4
    """Hidden layers between the summed embeddings and the outputs."""
    num_dimensions: int = 2
    """Positions of a sample, L: each has a table and an output layer of its own."""

    @property
    def condition_dim(self) -> int:
        """Nothing modulates a perceptron: latents are added to its embeddings."""
        return 0

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name in ("dim", "num_layers", "num_dimensions"):
            if getattr(self, name) < 1:
                yield f"backbone.{name}={getattr(self, name)} must be at least 1"


@dataclass(frozen=True, kw_only=True)
class RecognitionConfig(Settings):
    """The network r(z | x0, M) that reads the whole sequence in training, hidden tokens included."""

    num_layers: int | None = None
    """Blocks. Default: as many as the denoiser (VADD); VMD takes a quarter to two thirds of them."""
    dim: int | None = None
    """Width. Default: the denoiser's."""
    num_heads: int | None = None
    """Query heads. Default: as wide as the denoiser's."""
    marks: Literal["adaln", "added"] = "adaln"
    """How M is told: a learned vector modulates all norms at masked positions (VADD 3.3), or is added to its input."""
    pool: Literal["mean", "gated"] = "mean"
    """How positions become one vector: their mean, or a softmax over learned scores (VMD C.2)."""
    pool_over: Literal["maskable", "masked"] = "maskable"
    """Which positions: all that could be hidden (answers, not prompts), or those that are."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name in ("num_layers", "dim", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"latent.recognition.{name}={value} must be at least 1"


@dataclass(frozen=True, kw_only=True)
class LatentConfig(Settings):
    """A Gaussian latent that ties the tokens of a sequence, or of a block (VADD, VMD)."""

    dim: int = 128
    """Width of z."""
    inject: Literal["adaln", "embedding"] = "adaln"
    """How the denoiser hears z: by adaLN (backbone.modulation: per block or shared), or added to its embeddings."""
    prior: Literal["normal", "x_t", "earlier_blocks"] = "normal"
    """N(0, I); a learned p(z | x_t) (VMD E.3); or a learned p(z^b | z^(<b)) (VMD E.2)."""
    prior_layers: int = 1
    """Blocks of a learned prior."""
    num_samples: int = 1
    """z drawn for a sequence in training; several give the K-sample DELBO: tighter, for as many times the denoiser."""
    recognition: RecognitionConfig = field(default_factory=RecognitionConfig)
    """The recognition network, used in training only."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name in ("dim", "prior_layers", "num_samples"):
            if getattr(self, name) < 1:
                yield f"latent.{name}={getattr(self, name)} must be at least 1"
        yield from self.recognition.problems()


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Settings):
    """A noisy embedding of each hidden token, the hint (CADD)."""

    path: Literal["flow_matching", "vp"] = "flow_matching"
    """z_t = a z0 + b eps with a = 1 - t, b = t; or variance preserving, a = cos(pi t / 2), b = sin(pi t / 2)."""
    fusion: Literal["add", "concat", "reweight", "literal"] = "add"
    """How hint and mask embedding meet: sum; projection of both; alpha-weighted sum; or Algorithm 1 to the letter."""
    scale: Literal["half_life", "literal"] = "half_life"
    """half_life: rows normalised, so that the hint is lost around hint_half_life at any width; literal: as they are."""
    hint_half_life: float = 0.4
    """The time at which half of the hidden tokens can still be read off their hints."""
    gated: bool = False
    """Multiply the hint by a learned number that starts at 0: a model with init_from starts equal to its parent."""
    z0: Literal["soft", "hard"] = "soft"
    """The estimate of z0 in the MSE term: expected embedding, or that of the most probable token."""
    mse_weight: float = 0.0
    """Weight of |z0_hat - z0|^2 beside the cross-entropy; 0: cross-entropy alone."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        if not 0 < self.hint_half_life < 1:
            yield f"augmentation.hint_half_life={self.hint_half_life} must lie in (0, 1), for example 0.4"
        if not self.mse_weight >= 0:
            yield f"augmentation.mse_weight={self.mse_weight} must be 0 (off) or positive"
        if self.gated and self.fusion == "literal":
            yield "augmentation.gated=true with fusion=literal would not start equal to a parent: set fusion=add"
        if self.gated and self.fusion == "concat":
            yield (
                "augmentation.gated=true with fusion=concat starts with both closed, and neither would learn: "
                "set gated=false, or fusion=add"
            )


BackboneConfig = TransformerConfig | PointMlpConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """A masked diffusion model: its backbone, its forward process, its objective, and the three switches."""

    backbone: BackboneConfig = field(default_factory=TransformerConfig)
    """The denoiser."""
    vocab_size: int = 0
    """Rows of the embedding, the mask row included; 0: as many as the data's tokenizer has."""
    mask_id: int = -1
    """Token id that hides a position; -1: the tokenizer's."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The mask schedule alpha(t)."""
    time_conditioning: bool = False
    """Tell the denoiser t (needs backbone.condition_dim); off, it reads the noise level from the masks (MDLM)."""
    loss_weight: Literal["elbo", "uniform"] = "elbo"
    """elbo: -alpha'/(1 - alpha), the bound; uniform: 1 (CADD Eq. 20)."""
    normalize_by: Literal["maskable", "masked"] = "maskable"
    """Divisor of the summed loss; `masked` is DiffuLLaMA's and biased."""
    autoregressive: bool = False
    """The baseline: causal attention and next-token loss instead of diffusion."""
    block_size: int = 0
    """Positions of a block, written left to right (BD3-LM); 0: the whole sequence is one."""
    latent: LatentConfig | None = None
    """A latent per sequence, or per block (VADD, VMD)."""
    augmentation: AugmentationConfig | None = None
    """Continuous hints at masked positions (CADD)."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        shapes = [*self.backbone.problems(), *(() if self.latent is None else self.latent.problems())]
        yield from shapes or self._recognition_problems()
        yield from self.schedule.problems()
        if self.augmentation is not None:
            yield from self.augmentation.problems()
        yield from self._switch_problems()
        yield from self._conditioning_problems()
        if self.vocab_size < 0:
            yield f"vocab_size={self.vocab_size} must be 0 (as many as the tokenizer has) or positive"
        elif self.vocab_size and self.mask_id >= self.vocab_size:
            yield f"mask_id={self.mask_id} must be below vocab_size={self.vocab_size}"

    def _recognition_problems(self) -> Iterator[str]:
        if self.latent is None or self.backbone.kind == "point_mlp":
            return
        trunk = recognition_backbone(self)
        if trunk.head_width % 2:
            yield (
                f"latent.recognition.dim={trunk.dim} in num_heads={trunk.num_heads} makes heads of width "
                f"{trunk.head_width}, which must be even for rotary positions: set latent.recognition.num_heads=1 and "
                "an even dim, for example"
            )

    def _switch_problems(self) -> Iterator[str]:
        if self.block_size < 0:
            yield f"block_size={self.block_size} must be 0 (the whole sequence) or positive"
        switches = {"block_size": self.block_size, "latent": self.latent, "augmentation": self.augmentation}
        if self.autoregressive and any(switches.values()):
            on = ", ".join(name for name, value in switches.items() if value)
            yield f"autoregressive=true hides nothing, so {on} has nothing to act on: turn one of them off"
        if self.backbone.kind == "point_mlp" and (self.block_size or self.autoregressive):
            yield (
                "backbone.kind=point_mlp has no attention for block_size or autoregressive: "
                "set both off, or backbone.kind=transformer"
            )
        if self.latent is not None and self.latent.prior == "earlier_blocks" and not self.block_size:
            yield "latent.prior=earlier_blocks needs blocks: set block_size, or latent.prior=normal"
        if self.augmentation is not None and self.backbone.kind == "point_mlp":
            yield "augmentation needs backbone.kind=transformer: set augmentation=null"
        if self.latent is not None and self.latent.prior == "x_t" and self.backbone.kind == "point_mlp":
            yield "latent.prior=x_t needs backbone.kind=transformer: set latent.prior=normal"

    def _conditioning_problems(self) -> Iterator[str]:
        if self.backbone.kind == "point_mlp":
            if self.latent is not None and self.latent.inject == "adaln":
                yield "latent.inject=adaln has no conditioning path in a point_mlp: set latent.inject=embedding"
            return
        width = self.backbone.condition_dim
        if self.latent is not None and self.latent.inject == "adaln" and not width:
            yield (
                "latent.inject=adaln needs a conditioning path: set backbone.condition_dim, for example 128, "
                "or latent.inject=embedding"
            )
        if self.time_conditioning and not width:
            yield "time_conditioning=true needs a conditioning path: set backbone.condition_dim, for example 128"
        conditioned = self.time_conditioning or (self.latent is not None and self.latent.inject == "adaln")
        if width and not conditioned:
            yield (
                f"backbone.condition_dim={width} has nothing to carry: "
                "set time_conditioning=true, a latent with inject=adaln, or condition_dim=0"
            )

    def length_problems(self, length: int) -> Iterator[str]:
        """What does not fit rows of `length` positions."""
        if length < 1 or self.block_size < 0:
            return
        if self.block_size and length % self.block_size:
            divisors = [n for n in range(1, length + 1) if length % n == 0]
            yield f"block_size={self.block_size} does not divide the row length {length}: use one of {divisors}"
        if self.backbone.kind == "transformer" and 0 < self.backbone.max_positions < length:
            yield f"backbone.max_positions={self.backbone.max_positions} must be at least the row length, {length}"
        if self.backbone.kind == "point_mlp" and self.backbone.num_dimensions != length:
            yield f"backbone.num_dimensions={self.backbone.num_dimensions} must be the row length, {length}"

    def num_segments(self, length: int) -> int:
        """Parts of a row that have a time and a latent of their own."""
        assert not self.block_size or length % self.block_size == 0, f"blocks of {self.block_size} in {length}"
        return length // self.block_size if self.block_size else 1

    @property
    def objective(self) -> Literal["nelbo", "delbo", "nll_discrete"]:
        """What the training loss estimates; only a nelbo is a bound on -log p (docs/errata.md)."""
        if self.augmentation is not None:
            return "nll_discrete"
        return "nelbo" if self.latent is None else "delbo"

    def with_vocabulary(self, vocab_size: int, mask_id: int) -> "ModelConfig":
        """Fills what was left to the tokenizer.

        Raises:
            ValueError: the tokenizer does not fit a vocabulary or a mask that was set.
        """
        size = self.vocab_size or vocab_size
        if vocab_size > size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens but model.vocab_size={size}: "
                f"set model.vocab_size to 0 or to at least {vocab_size}"
            )
        if 0 <= self.mask_id != mask_id:
            raise ValueError(
                f"the tokenizer's mask id is {mask_id} but model.mask_id={self.mask_id}: "
                "set model.mask_id=-1 to take the tokenizer's"
            )
        return replace(self, vocab_size=size, mask_id=mask_id)


def recognition_backbone(config: ModelConfig) -> TransformerConfig:
    """The recognition network's transformer: the denoiser's, with its own depth and width, shifts and scales only."""
    assert config.latent is not None
    assert isinstance(config.backbone, TransformerConfig)
    wanted, b = config.latent.recognition, config.backbone
    dim = wanted.dim or b.dim
    num_heads = wanted.num_heads or (b.num_heads if dim == b.dim else max(1, dim // b.head_width))
    same = dim == b.dim and num_heads == b.num_heads
    return replace(
        b,
        dim=dim,
        num_layers=wanted.num_layers or b.num_layers,
        num_heads=num_heads,
        num_kv_heads=b.num_kv_heads if same else None,
        head_dim=b.head_dim if same else None,
        ffn_dim=b.ffn_dim if dim == b.dim else None,
        tie_embeddings=True,
        condition_dim=(b.condition_dim or dim) if wanted.marks == "adaln" else 0,
        modulation="per_block",
        gates="none",
        dropout=0.0,
    )
