"""A step of a run without its numbers: the run's own engine on fake tensors, as rank 0 of a world that is not there."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from data_pipeline.manifest import TOKENIZER_FOLDER
from data_pipeline.tokenizers import Tokenizer, make_tokenizer
from model.batch import Batch
from model.config import ModelConfig
from model.corruption import corrupt
from model.noise import NoiseKey
from pretrain.config import RunConfig
from pretrain.data import open_data
from pretrain.data_config import ShardData, ToyFunctionsData
from pretrain.engines import fsdp
from pretrain.engines.base import Micro
from pretrain.identity import rows_per_rank
from pretrain.parallel.mesh import Mesh, build_mesh, mesh_shape, single_process
from pretrain.schedules import step_schedule

from .attending import attending_on_gpu
from .tally import BETWEEN_DEVICES, Tally

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)
"""Both are the CPU, all that there need be; only the device, which stands for the GPU, has a number."""


@dataclass(frozen=True)
class Trace:
    """What one rank holds and sends in a step.

    Args:
        model: with its vocabulary.
        num_parameters: of the whole model.
        parameters: bytes of this rank's part of the weights, in the precision they are kept in.
        optimizer: bytes of the moments and of the average, where there is one.
        gradients: bytes of the gradients as the optimizer sees them.
        accumulated: bytes of the gradients that micro-batches add up, whole where they are not reduced yet.
        activations: bytes that a micro-batch's forward pass leaves for its backward pass.
        peak: most bytes at once on the device.
        host: most bytes at once on the host, where the run keeps weights, gradients and optimizer there; else 0.
        num_micros: micro-batches of a step.
        micro_rows: rows of a micro-batch.
        masked_share: of the positions of a rank's batch, on which the head runs.
        sent_per_micro: bytes on each mesh axis for every micro-batch but the last.
        sent_by_last: bytes on each mesh axis for the last one, and for clipping.
        axes: ranks of each mesh axis, as numbers of the world; this rank's own of the wire to the host, if it is used.
        kernels: what attends, by the kinds of the mask.
    """

    model: ModelConfig
    num_parameters: int
    parameters: int
    optimizer: int
    gradients: int
    accumulated: int
    activations: int
    peak: int
    host: int
    num_micros: int
    micro_rows: int
    masked_share: float
    sent_per_micro: Mapping[str, float]
    sent_by_last: Mapping[str, float]
    axes: Mapping[str, tuple[int, ...]]
    kernels: Mapping[str, str]

    @property
    def sent(self) -> dict[str, float]:
        """Bytes on each mesh axis, and to and from the host, in a whole step."""
        every, last = self.sent_per_micro, self.sent_by_last
        return {axis: (self.num_micros - 1) * every.get(axis, 0.0) + last.get(axis, 0.0) for axis in self.axes}


def trace(config: RunConfig, world: int, *, on_gpu: bool = True) -> Trace:
    """Builds the run as rank 0 of `world` processes and takes one step, by two micro-batches where there are more.

    The micro-batch is the one of its first batch in which most is masked: what runs out of memory, if any does.

    Args:
        on_gpu: attention by the kernels and in the precision of a GPU; False: as on this machine.

    Raises:
        ValueError: these processes can not divide the run, the vocabulary is not known without its data, or
            train.attention can not do what the run asks of it.
    """
    model = _with_vocabulary(config)
    kernels: AbstractContextManager[dict[str, str]] = attending_on_gpu() if on_gpu else nullcontext({})
    with _world(config, world, DEVICE if on_gpu else HOST) as mesh, kernels as chosen:
        rows = rows_per_rank(config, mesh)
        micro_tokens = config.train.micro_batch_tokens
        micro_rows = rows if micro_tokens is None else min(rows, micro_tokens // config.data.length)
        micros = [_micro(model, first, micro_rows, config) for first in range(0, rows, micro_rows)]
        masked = sum(micro.corruption.num_masked for micro in micros)
        micro = max(micros, key=lambda each: each.corruption.num_masked)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        engine = _engine(config, model, mesh, fake)
        with fake:
            traced = _step(engine, config, _faked(micro, fake).to(mesh.device), len(micros))
        share = masked / (len(micros) * micro_rows * config.data.length)
        return replace(traced, masked_share=share, kernels=chosen)


def _engine(config: RunConfig, model: ModelConfig, mesh: Mesh, fake: FakeTensorMode) -> fsdp.FsdpEngine:
    """The run's engine, whose weights have shapes but no memory and no values."""
    to_empty = nn.Module.to_empty

    def faked(module: nn.Module, **where: Any) -> nn.Module:
        with fake:
            return to_empty(module, **where)

    with patch.object(nn.Module, "to_empty", faked), patch.object(fsdp, "initialise", lambda *_, **__: None):
        return fsdp.FsdpEngine(model, config.optim, config.train, config.parallel, mesh, seed=0)


def _step(engine: fsdp.FsdpEngine, config: RunConfig, micro: Micro, num_micros: int) -> Trace:
    mesh, device = engine.mesh, engine.mesh.device
    state = {group: list(named.values()) for group, named in engine.state_dict().items()}
    axes = _axes(mesh)
    held = [*(t for group in state.values() for t in group)]
    with Tally(held, {name: axis for axis, (name, _) in axes.items()}) as tally:
        standing = tally.bytes[device]
        early: dict[str, float] = {}
        if num_micros > 1:
            engine.forward_backward(micro, scale=1.0, last=False)
            early = dict(tally.sent)
            tally.sent.clear()
        before = tally.bytes[device]
        kept = _after_forward(engine, micro, tally) - before
        engine.reduce_and_clip(config.train.clip_norm)
        gradients = sum(_size(p.grad) for p in engine.parameters.values() if p.grad is not None)
        take = torch.ones((), device=device)
        engine.step(lr=1e-4, take=take)
        engine.update_ema(config.train.ema_decay, take=take)
    ranks = {axis: ranks for axis, (_, ranks) in axes.items()}
    offload = config.parallel.offload
    moments = sum(_size(t) for group, tensors in state.items() if group != "model" for t in tensors)
    return Trace(
        model=engine.model.config,
        num_parameters=engine.num_parameters,
        parameters=sum(map(_size, state["model"])),
        optimizer=moments,
        gradients=gradients,
        accumulated=before - standing,
        activations=kept,
        peak=tally.peak[device],
        host=tally.peak[HOST] if offload else 0,
        num_micros=num_micros,
        micro_rows=micro.batch.num_sequences,
        masked_share=0.0,
        sent_per_micro=early,
        sent_by_last=dict(tally.sent),
        axes=ranks | {BETWEEN_DEVICES: (0,)} if offload else ranks,
        kernels={},
    )


def _after_forward(engine: fsdp.FsdpEngine, micro: Micro, tally: Tally) -> int:
    """One pass through the model, and the bytes that were held between its two halves."""
    found: list[int] = []
    backward = Tensor.backward

    def noting(tensor: Tensor, *args: object, **kwargs: object) -> None:
        found.append(tally.bytes[engine.mesh.device])
        backward(tensor, *args, **kwargs)

    with patch.object(Tensor, "backward", noting):
        engine.forward_backward(micro, scale=1.0, last=True)
    return found[0]


def _with_vocabulary(config: RunConfig) -> ModelConfig:
    """The model as large as its tokenizer, where the settings leave that to the data."""
    size = config.model.vocab_size or _vocabulary_of(config)
    if not size:
        raise ValueError(
            "model.vocab_size is left to the tokenizer of data that is not here: pass it, for example "
            "model.vocab_size=50258, or tokenise the data first"
        )
    mask_id = config.model.mask_id if config.model.mask_id >= 0 else size - 1
    return replace(config.model, vocab_size=size, mask_id=mask_id)


def _vocabulary_of(config: RunConfig) -> int:
    """Size of the tokenizer beside the shards, or of the one that makes them; 0: neither says it."""
    data = config.data
    if isinstance(data, ToyFunctionsData):
        return data.vocab_size
    if not isinstance(data, ShardData):
        return open_data(data, single_process().world).tokenizer.vocab_size
    if (folder := Path(data.path) / TOKENIZER_FOLDER).is_dir():
        return Tokenizer.load(folder).vocab_size
    kind, _, size = data.prepare.tokenizer.partition(":") if data.prepare else ("", "", "")
    if kind == "bytes":
        return make_tokenizer(kind, lambda: iter(())).vocab_size
    return int(size) if kind == "bpe" else 0


def _micro(model: ModelConfig, first: int, num_rows: int, config: RunConfig) -> Micro:
    """The rows from `first` of a first batch, corrupted by the run's own noise; each is one document."""
    tokens_BL = torch.zeros(num_rows, config.data.length, dtype=torch.int64)
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        positions_BL=torch.arange(config.data.length).expand(num_rows, -1),
        index_B=torch.arange(first, first + num_rows),
        document_BL=torch.zeros_like(tokens_BL, dtype=torch.int32) if isinstance(config.data, ShardData) else None,
    )
    return Micro(batch, corrupt(batch, NoiseKey(config.seed, 0, batch.index_B), model), step_schedule(0, config))


def _faked(micro: Micro, fake: FakeTensorMode) -> Micro:
    batch = micro.batch._map(fake.from_tensor)
    return Micro(batch, micro.corruption._map(fake.from_tensor), micro.step)


@contextmanager
def _world(config: RunConfig, size: int, device: torch.device) -> Iterator[Mesh]:
    """The mesh that the run would have, over a process group that carries nothing."""
    shape = mesh_shape(config.parallel, size)
    if size == 1:
        yield single_process(device)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with patch.object(_fully_shard, "_get_device_from_mesh", lambda _: device):
            yield build_mesh(device, shape)
    finally:
        _clear_sharding_prop_cache()  # which remembers groups by their ranks, also those that are gone
        dist.destroy_process_group()


def _axes(mesh: Mesh) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of the group and ranks of every axis that has more than one; `all` where a group spans them."""
    if mesh.devices is None:
        return {}
    found = {}
    for axis in ("weights", "replicate", "tensor", "context"):
        group = mesh.devices[axis].get_group()
        if group.size() > 1:
            found[axis] = (str(group.group_name), tuple(dist.get_process_group_ranks(group)))
    return found


def _size(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
