"""Megatron-core: its tensor-parallel layers in our model, and data parallel around them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from model.config import ModelConfig, TransformerConfig
from model.diffusion import LossTerms, MaskedDiffusion
from model.initialisation import initialise
from model.transformer import use_attention

from ..config import OptimConfig, TrainConfig
from ..ema import Ema
from ..freeze import freeze
from ..optim import MOMENTS, make_optimizer, optimizer_step
from ..parallel.blocks import prepare_blocks
from ..parallel.layout import Role, role_of
from ..parallel.megatron_groups import start_groups
from ..parallel.megatron_layers import refuse_empty_parts, use_megatron_layers
from ..parallel.mesh import Mesh
from ..parallel.tensor import refuse_indivisible
from .base import Micro, Tensors

PLACEMENTS: dict[Role, Placement] = {"column": Shard(0), "vocab": Shard(0), "row": Shard(1), "replicate": Replicate()}
BUCKET_BYTES = 64 * 2**20


class MegatronEngine:
    """Every process of the data axis holds all that its place on the tensor axis holds: weights, moments, averages.

    Weights are float32 and plain tensors; bf16 is autocast. The canonical state shows them as DTensors on the tensor
    axis, from the layout, so that a checkpoint does not know which engine wrote it.
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, train: TrainConfig, mesh: Mesh, *, seed: int) -> None:
        self.mesh, self.autocast = mesh, train.precision == "bf16"
        divisible = isinstance(model.backbone, TransformerConfig)
        if mesh.tensor.size > 1:
            refuse_indivisible(model, mesh.tensor.size)
            refuse_empty_parts(model, mesh.tensor.size)
        self.tensor_group, self.data_group = start_groups(mesh)
        with torch.device("meta"):
            self.model = MaskedDiffusion(model)
        use_attention(self.model, train.attention, mesh.device)
        freeze(self.model, train.freeze)
        self.wholes = {name: p.detach() for name, p in self.model.named_parameters()}
        self.num_parameters = sum(p.numel() for p in self.wholes.values())
        self.placements = {name: PLACEMENTS[role_of(name)] if divisible else Replicate() for name in self.wholes}
        self.tensor_axis = None if mesh.devices is None else mesh.devices["tensor"]
        if self.tensor_axis is not None:
            _divide(self.model, self.placements, self.tensor_axis)
        self.model.to_empty(device=mesh.device)
        initialise(self.model, seed, num_layers=model.backbone.num_layers)
        if divisible:
            use_megatron_layers(self.model, self.tensor_group)
        prepare_blocks(self.model, recompute=train.recompute, compile_blocks=False)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.parameters.values(), optim)
        self.average = Ema(self.parameters) if train.ema_decay else None

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """See Engine."""
        self.model.train()
        with self._precision():
            terms = self._forward(micro)
        (terms.loss * scale).backward()
        return replace(terms, loss=terms.loss.detach())

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> LossTerms:
        """See Engine."""
        self.model.eval()
        with self._precision():
            return self._forward(micro)

    @torch.no_grad()
    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine.

        Every process adds its part of what is divided and its share of what is not, and gets the same bits back, so
        that all take the step or none does.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.mesh.data.size > 1:
            add_up(list(gradients.values()), self.data_group)
        divided = [g for name, g in gradients.items() if isinstance(self.placements[name], Shard)]
        whole = [g for name, g in gradients.items() if not isinstance(self.placements[name], Shard)]
        square = self._square(divided) + self._square(whole) / self.mesh.tensor.size
        dist.all_reduce(square, group=self.tensor_group)
        norm = square.sqrt()
        torch._foreach_mul_([*divided, *whole], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, *, lr: float, take: Tensor) -> None:
        """See Engine."""
        optimizer_step(self.optimizer, lr=lr, take=take)
        self.optimizer.zero_grad(set_to_none=True)

    def update_ema(self, decay: float, *, take: Tensor) -> None:
        """See Engine."""
        if self.average is not None:
            self.average.update(decay, take)

    def ema(self) -> AbstractContextManager[None]:
        """See Engine."""
        return nullcontext() if self.average is None else self.average.swapped()

    def state_dict(self) -> Tensors:
        """See Engine."""
        return {
            group: {name: self._canonical(name, local) for name, local in named.items()}
            for group, named in self._locals().items()
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """See Engine; the tensors lie as those of `state_dict` do."""
        for group, named in self._locals().items():
            for name, local in named.items():
                loaded = tensors[group][name]
                local.copy_(loaded.to_local() if isinstance(loaded, DTensor) else loaded)
        for state in self.optimizer.state.values():
            state["step"].fill_(num_updates)

    def _locals(self) -> Tensors:
        """What this process holds of the canonical state."""
        named = self.parameters
        tensors: Tensors = {"model": {name: p.detach() for name, p in named.items()}}
        for moment in MOMENTS:
            tensors[moment] = {name: self.optimizer.state[p][moment] for name, p in named.items() if p.requires_grad}
        if self.average is not None:
            tensors["ema"] = self.average.shadow
        return tensors

    def _canonical(self, name: str, local: Tensor) -> Tensor:
        """A local tensor as the part that it is, on the same memory."""
        if self.tensor_axis is None:
            return local
        whole = self.wholes[name]
        return DTensor.from_local(
            local,
            self.tensor_axis,
            [self.placements[name]],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _forward(self, micro: Micro) -> LossTerms:
        micro = micro.to(self.mesh.device)
        terms: LossTerms = self.model(micro.batch, micro.corruption, step=micro.step)
        return terms

    def _precision(self) -> AbstractContextManager[None]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.mesh.device.type, dtype=torch.bfloat16)

    def _square(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self.mesh.device)
        return torch.stack(torch._foreach_norm(gradients)).square().sum()


def add_up(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums gradients over the processes of a group, a bucket of them in one message."""
    for bucket in _buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, each at most BUCKET_BYTES, or one larger tensor."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in [*bucket, gradient]) > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _divide(model: nn.Module, placements: Mapping[str, Placement], tensor: DeviceMesh) -> None:
    """Parameters on the meta device become DTensors where the layout divides them, so that they are never whole."""
    for name, placement in placements.items():
        if isinstance(placement, Shard):
            owner, _, key = name.rpartition(".")
            whole = model.get_parameter(name)
            part = distribute_tensor(whole.detach(), tensor, [placement])
            model.get_submodule(owner).register_parameter(key, nn.Parameter(part, requires_grad=whole.requires_grad))
