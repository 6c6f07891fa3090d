"""FSDP2: parameters, gradients and optimizer state sharded; where there is nothing to shard, a plain module."""

import re
import warnings
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

from model.config import ModelConfig
from model.diffusion import LossTerms, MaskedDiffusion
from model.initialisation import initialise
from model.transformer import use_attention

from ..config import OptimConfig, ParallelConfig, TrainConfig
from ..freeze import freeze
from ..parallel.blocks import divide_positions, prepare_blocks
from ..parallel.gradient_sum import add_up
from ..parallel.layout import SHARDING_UNITS
from ..parallel.mesh import Mesh
from ..parallel.tensor import divide_matrices, partial_gradients
from .base import Micro
from .module import ModuleEngine, is_on_axis, local_part


class FsdpEngine(ModuleEngine):
    """Builds the model on the meta device, shards it, and fills it by name, so no rank ever holds all of it.

    Processes that each hold all of the weights (parallel.replicate) need no gathering: they add their gradients up.
    """

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
        with torch.device("meta"):
            made = MaskedDiffusion(model)
        use_attention(made, train.attention, mesh.device)
        freeze(made, train.freeze)
        divide_positions(made, mesh.context, mesh.tensor)
        prepare_blocks(made, recompute=train.recompute, compile_blocks=train.compile)
        devices, sharded, parts = mesh.devices, False, []
        if devices is not None:
            sharded = devices["weights"].size() > 1 or mesh.tensor.size > 1 or parallel.offload
            parts = [devices[axis].get_group() for axis in ("weights", "tensor") if devices[axis].size() > 1]
            if mesh.tensor.size > 1:
                divide_matrices(made, devices["tensor"])
            if sharded:
                _shard(made, devices, train.precision, offload=parallel.offload)
        made.to_empty(device="cpu" if parallel.offload else mesh.device)
        initialise(made, seed, num_layers=model.backbone.num_layers)
        super().__init__(
            made,
            mesh,
            optim,
            train,
            autocast=train.precision == "bf16" and not sharded,
            divided=[name for name, p in made.named_parameters() if is_on_axis(p, "tensor")],
            replicas=None if devices is None or sharded else devices["replicate"].get_group(),
            parts=parts,
        )
        self.partial = partial_gradients(made)

    def forward_backward(self, micro: Micro, *, scale: float, last: bool) -> LossTerms:
        """See Engine."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return super().forward_backward(micro, scale=scale, last=last)

    def evaluate(self, micro: Micro) -> LossTerms:
        """See Engine."""
        terms = super().evaluate(micro)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # the root waits for a backward pass that does not come
        return terms if self.mesh.context.size == 1 else self._of_whole_rows(terms)

    @torch.no_grad()
    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """See Engine."""
        gradients = [p.grad for p in map(self.parameters.__getitem__, self.partial) if p.grad is not None]
        if gradients:
            assert self.mesh.tensor.group is not None
            add_up([local_part(gradient) for gradient in gradients], self.mesh.tensor.group)
        return super().reduce_and_clip(max_norm)

    def _of_whole_rows(self, terms: LossTerms) -> LossTerms:
        """Sums of the processes that share a row."""
        sums = torch.cat((torch.stack((terms.loss, terms.cross_entropy)), terms.loss_B))
        dist.all_reduce(sums, group=self.mesh.context.group)
        return replace(terms, loss=sums[0], cross_entropy=sums[1], loss_B=sums[2:])


def _shard(model: nn.Module, devices: DeviceMesh, precision: str, *, offload: bool) -> None:
    """Shards every unit of the layout and then the rest; sums of gradients, no division."""
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")  # nobody changes it
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
