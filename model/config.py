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
    """Exponent of the polynomial schedule."""
    beta_min: float = 1e-5
    """Total noise at t = 0 of the geometric schedule."""
    beta_max: float = 20.0
    """Total noise at t = 1 of the geometric schedule."""
    t_min: float = 1e-3
    """Smallest time drawn in training; bounds need none."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        if not 0 <= self.t_min < 1:
            yield f"schedule.t_min={self.t_min} must lie in [0, 1), for example 0.001"
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
    condition_dim: int = 0
    """Width of the vector (time, latent) that modulates every block by adaLN-zero; 0: no conditioning."""
    modulation: Literal["per_block", "shared"] = "per_block"
    """One adaLN projection in each block, or one that all blocks share."""
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
        if self.condition_dim < 0:
            yield f"backbone.condition_dim={self.condition_dim} must be 0 (off) or positive"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """A masked diffusion model: its backbone, its forward process and its objective."""

    backbone: TransformerConfig = field(default_factory=TransformerConfig)
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

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        yield from self.backbone.problems()
        yield from self.schedule.problems()
        if self.time_conditioning and not self.backbone.condition_dim:
            yield "time_conditioning=true needs a conditioning path: set backbone.condition_dim, for example 128"
        if self.backbone.condition_dim and not self.time_conditioning:
            yield (
                f"backbone.condition_dim={self.backbone.condition_dim} has nothing to carry: "
                "set time_conditioning=true or condition_dim=0"
            )
        if self.vocab_size < 0:
            yield f"vocab_size={self.vocab_size} must be 0 (as many as the tokenizer has) or positive"
        elif self.vocab_size and self.mask_id >= self.vocab_size:
            yield f"mask_id={self.mask_id} must be below vocab_size={self.vocab_size}"

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
