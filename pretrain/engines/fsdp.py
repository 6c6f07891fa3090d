"""FSDP2: parameters, gradients and optimizer state sharded over the data axis; alone, a plain module."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from model.config import ModelConfig
from model.diffusion import LossTerms, MaskedDiffusion
from model.initialisation import initialise
from model.transformer import use_attention

from ..config import OptimConfig, ParallelConfig, TrainConfig
from ..ema import Ema
from ..freeze import freeze
from ..optim import MOMENTS, make_optimizer, optimizer_step
from ..parallel.layout import SHARDING_UNITS
from ..parallel.mesh import Mesh
from .base import Micro, Tensors


class FsdpEngine:
    """Builds the model on the meta device, shards it, and fills it by name, so no rank ever holds all of it."""

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        *,
        seed: int,
    ) -> None:
        self.mesh = mesh
        with torch.device("meta"):
            self.model = MaskedDiffusion(model)
        self.model.denoiser.recompute_blocks = train.recompute == "full"
        use_attention(self.model, train.attention, mesh.device)
        freeze(self.model, train.freeze)
        self.autocast = train.precision == "bf16" and mesh.devices is None
        if mesh.devices is not None:
            _shard(self.model, mesh.devices, train.precision)
        self.model.to_empty(device=mesh.device)
        initialise(self.model, seed, num_layers=model.backbone.num_layers)
        self.parameters = dict(self.model.named_parameters())
        self.num_parameters = sum(p.numel() for p in self.parameters.values())
        self.optimizer = make_optimizer(self.parameters.values(), optim)
        self.average = Ema(self.parameters) if train.ema_decay else None

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """See Engine."""
        self.model.train()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        with self._precision():
            terms = self._forward(micro)
        (terms.loss * scale).backward()
        return replace(terms, loss=terms.loss.detach())

    @torch.no_grad()
    def evaluate(self, micro: Micro) -> LossTerms:
        """See Engine."""
        self.model.eval()
        with self._precision():
            terms = self._forward(micro)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # the root waits for a backward pass that does not come
        return terms

    @torch.no_grad()
    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine."""
        gradients = [_local(p.grad) for p in self.parameters.values() if p.grad is not None]
        square = torch.zeros((), device=self.mesh.device)
        if held := [g for g in gradients if g.numel()]:
            square = torch.stack(torch._foreach_norm(held)).square().sum()
        if self.mesh.devices is not None:
            dist.all_reduce(square, group=self.mesh.devices["weights"].get_group())
        norm = square.sqrt()
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
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
        named = self.parameters
        tensors: Tensors = {"model": {name: p.detach() for name, p in named.items()}}
        for moment in MOMENTS:
            tensors[moment] = {name: self.optimizer.state[p][moment] for name, p in named.items() if p.requires_grad}
        if self.average is not None:
            tensors["ema"] = self.average.shadow
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """See Engine."""
        for group, named in self.state_dict().items():
            for name, tensor in named.items():
                if tensor is not tensors[group][name]:
                    tensor.copy_(tensors[group][name])
        for state in self.optimizer.state.values():
            state["step"].fill_(num_updates)

    def _forward(self, micro: Micro) -> LossTerms:
        micro = micro.to(self.mesh.device)
        terms: LossTerms = self.model(micro.batch, micro.corruption, step=micro.step)
        return terms

    def _precision(self) -> AbstractContextManager[None]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.mesh.device.type, dtype=torch.bfloat16)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(model: nn.Module, devices: DeviceMesh, precision: str) -> None:
    """Shards every unit of the layout and then the rest; sums of gradients, no division."""
    compute = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = [module for name, module in model.named_modules() if re.fullmatch(SHARDING_UNITS, name)]
    for module in [*units, model]:
        fully_shard(module, mesh=devices["replicate", "weights"], mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "denoise")
    register_fsdp_forward_method(model, "infer")
