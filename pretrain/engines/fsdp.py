"""FSDP2: parameters, gradients and optimizer state sharded over the data axis; alone, a plain module."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
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
from ..parallel.blocks import divide_positions, prepare_blocks
from ..parallel.layout import SHARDING_UNITS
from ..parallel.mesh import Mesh
from ..parallel.tensor import divide_matrices
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
        if parallel.offload and mesh.devices is None:
            raise ValueError("parallel.offload=true shards over processes: start several, or set it to false")
        self.mesh = mesh
        with torch.device("meta"):
            self.model = MaskedDiffusion(model)
        use_attention(self.model, train.attention, mesh.device)
        freeze(self.model, train.freeze)
        self.autocast = train.precision == "bf16" and mesh.devices is None
        divide_positions(self.model, mesh.context)
        prepare_blocks(self.model, recompute=train.recompute, compile_blocks=train.compile)
        if mesh.devices is not None:
            if mesh.tensor.size > 1:
                divide_matrices(self.model, mesh.devices["tensor"])
            _shard(self.model, mesh.devices, train.precision, offload=parallel.offload)
        self.held = torch.device("cpu") if parallel.offload else mesh.device
        self.model.to_empty(device=self.held)
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
        return terms if self.mesh.context.size == 1 else self._of_whole_rows(terms)

    @torch.no_grad()
    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine."""
        divided, whole = (
            [_local(p.grad) for p in self.parameters.values() if p.grad is not None and _is_divided(p) == wanted]
            for wanted in (True, False)
        )
        squares = torch.stack((_square(divided, self.held), _square(whole, self.held)))
        if self.mesh.devices is not None:
            dist.all_reduce(squares, group=self.mesh.devices["weights"].get_group())
        if self.mesh.tensor.size > 1:
            dist.all_reduce(squares[0], group=self.mesh.tensor.group)
        norm = squares.sum().sqrt()
        torch._foreach_mul_([*divided, *whole], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.to(self.mesh.device)

    def step(self, *, lr: float, take: Tensor) -> None:
        """See Engine."""
        optimizer_step(self.optimizer, lr=lr, take=take.to(self.held))
        self.optimizer.zero_grad(set_to_none=True)

    def update_ema(self, decay: float, *, take: Tensor) -> None:
        """See Engine."""
        if self.average is not None:
            self.average.update(decay, take.to(self.held))

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

    def _of_whole_rows(self, terms: LossTerms) -> LossTerms:
        """Sums of the processes that share a row."""
        sums = torch.cat((torch.stack((terms.loss, terms.cross_entropy)), terms.loss_B))
        dist.all_reduce(sums, group=self.mesh.context.group)
        return replace(terms, loss=sums[0], cross_entropy=sums[1], loss_B=sums[2:])

    def _precision(self) -> AbstractContextManager[None]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.mesh.device.type, dtype=torch.bfloat16)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_divided(parameter: Tensor) -> bool:
    """Whether the tensor axis divides it, rather than every process of that axis holding it."""
    return isinstance(parameter, DTensor) and "tensor" in (parameter.device_mesh.mesh_dim_names or ())


def _square(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    held = [g for g in gradients if g.numel()]
    return torch.stack(torch._foreach_norm(held)).square().sum() if held else torch.zeros((), device=device)


def _shard(model: nn.Module, devices: DeviceMesh, precision: str, *, offload: bool) -> None:
    """Shards every unit of the layout and then the rest; sums of gradients, no division."""
    compute = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = [module for name, module in model.named_modules() if re.fullmatch(SHARDING_UNITS, name)]
    mesh = devices["weights"] if devices["replicate"].size() == 1 else devices["replicate", "weights"]
    held = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for module in [*units, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=held)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "denoise")
    register_fsdp_forward_method(model, "infer")
