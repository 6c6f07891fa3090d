"""Attention behind one function; the mask is prepared once per forward pass and shared by all layers.

Shapes: B sequences, L positions, Q queries, S keys, H query heads, G key/value heads, K head width, D width.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .flash import FlashPlan, flash_kernel
from .flex import FlexPlan
from .masks import MaskKind, MaskSpec
from .sdpa import SdpaPlan
from .sequence import SequencePart

BackendName = Literal["sdpa", "flex", "flash"]
AttentionName = Literal["auto", "sdpa", "flex", "flash"]


@dataclass(frozen=True)
class Backend:
    """What a backend can do; whatever else is asked of it is refused.

    Args:
        masks: kinds of mask that it expresses.
        computes_on: kinds of device; None: all.
        trains_on: kinds of device on which it has a backward pass; None: all.
        dtypes: what queries, keys and values may be; None: anything.
        parts: whether queries may be a part of the positions (context parallel).
        instead: the backend that expresses the masks which it does not.
    """

    masks: frozenset[MaskKind] = frozenset(get_args(MaskKind))
    computes_on: frozenset[str] | None = None
    trains_on: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    parts: bool = False
    instead: BackendName = "sdpa"


BACKENDS: dict[BackendName, Backend] = {
    "sdpa": Backend(parts=True),
    "flex": Backend(computes_on=frozenset({"cpu", "cuda"}), trains_on=frozenset({"cuda"})),
    "flash": Backend(
        masks=frozenset({"bidirectional", "causal", "documents"}),
        computes_on=frozenset({"cuda"}),
        trains_on=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        instead="flex",
    ),
}


@dataclass
class KVCache:
    """Keys and values of positions already processed, one pair per layer, each [B, S, G, K]."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: bool = False

    def reading(self) -> "KVCache":
        """The same keys and values; what is seen through it is not kept (a block that is still being denoised)."""
        return KVCache(self.layers, frozen=True)

    def rows(self, index_B: Tensor) -> "KVCache":
        """The cache of some of the sequences."""
        return KVCache([(key[index_B], value[index_B]) for key, value in self.layers], self.frozen)

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0][0].shape[1] if self.layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, new positions included, which are kept unless frozen."""
        if layer < len(self.layers):
            old_key, old_value = self.layers[layer]
            key, value = torch.cat((old_key, key), dim=1), torch.cat((old_value, value), dim=1)
        if not self.frozen:
            self.layers[layer:] = [(key, value), *self.layers[layer + 1 :]]
        return key, value


class AttentionPlan(Protocol):
    """A mask made ready for a backend."""

    def attend(self, query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor) -> Tensor:
        """Softmax attention [B, Q, H, K] under that mask."""


def prepare(
    mask: MaskSpec, x_BLD: Tensor, num_cached: int, name: AttentionName = "sdpa", part: SequencePart | None = None
) -> AttentionPlan:
    """Compiles a mask for one forward pass, in which the positions of `x_BLD` follow `num_cached` earlier ones.

    Args:
        part: which of these positions are the queries; None: all of them.

    Raises:
        ValueError: documents together with a cache, or a backend that can not do what is asked of it.
    """
    if mask.document_BL is not None and num_cached:
        raise ValueError("a KV cache holds one document per row: drop document_BL or the cache")
    (num_rows, num_queries), device = x_BLD.shape[:2], x_BLD.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x_BLD.dtype
    backend = choose(mask, device, dtype, part) if name == "auto" else name
    refuse_unexpressible(backend, mask, part)
    refuse_device(backend, device, training=torch.is_grad_enabled())
    if backend == "flex":
        return FlexPlan.of(mask, num_queries, num_cached, device)
    if backend == "flash":
        refuse_dtype(backend, dtype)
        return FlashPlan.of(mask, num_rows, num_queries, num_cached, device, flash_kernel())
    plan = SdpaPlan.of(mask, num_queries, num_cached, device)
    return plan if part is None else plan.of_part(part)


def attend(query_BQHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention [B, Q, H, K]; queries that see no key give zeros."""
    device, dtype = query_BQHK.device.type, query_BQHK.dtype
    compute = computing_dtype(device, dtype)
    with torch.autocast(device, enabled=False):
        return plan.attend(query_BQHK.to(compute), key_BSGK.to(compute), value_BSGK.to(compute)).to(dtype)


def computing_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """On the CPU float32 for bfloat16, whose kernel's backward pass is several times slower there."""
    return torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype


def choose(mask: MaskSpec, device: torch.device, dtype: torch.dtype, part: SequencePart | None = None) -> BackendName:
    """What `auto` stands for: SDPA, and on an NVIDIA GPU what needs no dense mask."""
    flash = BACKENDS["flash"]
    if device.type != "cuda" or part is not None or mask.kinds in (["bidirectional"], ["causal"]):
        return "sdpa"
    return "flash" if flash.masks.issuperset(mask.kinds) and dtype in (flash.dtypes or ()) else "flex"


def refuse_unexpressible(name: BackendName, mask: MaskSpec, part: SequencePart | None = None) -> None:
    """Raises ValueError for a kind of mask that the backend does not express, or for parts that it can not serve."""
    backend = BACKENDS[name]
    if part is not None and not backend.parts:
        raise ValueError(
            f"train.attention={name} can not divide positions: set train.attention=sdpa, or parallel.context=1"
        )
    for kind in mask.kinds:
        if kind not in backend.masks:
            raise ValueError(
                f"train.attention={name} can not express a mask of {kind}, only of {', '.join(sorted(backend.masks))}: "
                f"set train.attention={backend.instead}"
            )


def refuse_device(name: AttentionName, device: torch.device, *, training: bool) -> None:
    """Raises ValueError for a backend that does not exist, or does not compute (or train) there."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"train.attention={name!r} is not one of {', '.join(get_args(AttentionName))}")
    backend = BACKENDS[name]
    for able, what in ((backend.computes_on, "computes"), (backend.trains_on if training else None, "trains")):
        if able is not None and device.type not in able:
            raise ValueError(
                f"train.attention={name} {what} on {' and '.join(sorted(able))} only, not on {device.type}: "
                "set train.attention=sdpa"
            )


def refuse_dtype(name: BackendName, dtype: torch.dtype) -> None:
    """Raises ValueError for numbers that the backend does not compute with."""
    able = BACKENDS[name].dtypes
    if able is not None and dtype not in able:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in able))
        raise ValueError(
            f"train.attention={name} computes in {names}, not in {str(dtype).removeprefix('torch.')}: "
            "set train.precision=bf16, or train.attention=sdpa"
        )
