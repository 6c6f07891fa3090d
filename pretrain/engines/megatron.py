"""Megatron-core: its tensor-parallel layers in our model, and data parallel around them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from model.config import ModelConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from model.transformer import use_attention

from ..config import OptimConfig, TrainConfig
from ..freeze import freeze
from ..parallel.blocks import prepare_blocks
from ..parallel.layout import Role, role_of
from ..parallel.megatron_groups import start_groups
from ..parallel.megatron_layers import refuse_empty_parts, use_megatron_layers
from ..parallel.mesh import Mesh
from ..parallel.tensor import refuse_indivisible
from .module import ModuleEngine

PLACEMENTS: dict[Role, Placement] = {"column": Shard(0), "vocab": Shard(0), "row": Shard(1)}
"""Of what is divided; every process has all of the rest."""
WHOLE = Replicate()


class MegatronEngine(ModuleEngine):
    """Every process of the data axis holds all that its place on the tensor axis holds: weights, moments, averages.

    Weights are float32 and plain tensors; bf16 is autocast. The canonical state shows them as DTensors on the tensor
    axis, from the layout, so that a checkpoint does not know which engine wrote it.
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, train: TrainConfig, mesh: Mesh, *, seed: int) -> None:
        divisible = isinstance(model.backbone, TransformerConfig)
        if mesh.tensor.size > 1:
            refuse_indivisible(model, mesh.tensor.size)
            refuse_empty_parts(model, mesh.tensor.size)
        tensor_group, data_group = start_groups(mesh)
        with torch.device("meta"):
            made = MaskedDiffusion(model)
        use_attention(made, train.attention, mesh.device)
        freeze(made, train.freeze)
        self.wholes = {name: p.detach() for name, p in made.named_parameters()}
        self.placements = {name: PLACEMENTS.get(role_of(name), WHOLE) if divisible else WHOLE for name in self.wholes}
        self.tensor_axis = None if mesh.devices is None else mesh.devices["tensor"]
        if self.tensor_axis is not None:
            _divide(made, self.placements, self.tensor_axis)
        made.to_empty(device=mesh.device)
        initialise(made, seed, num_layers=model.backbone.num_layers)
        if divisible:
            use_megatron_layers(made, tensor_group)
        prepare_blocks(made, recompute=train.recompute, compile_blocks=False)
        super().__init__(
            made,
            mesh,
            optim,
            train,
            autocast=train.precision == "bf16",
            divided=[name for name, placement in self.placements.items() if isinstance(placement, Shard)],
            replicas=data_group if mesh.data.size > 1 else None,
            parts=[tensor_group],
        )
        self.num_parameters = sum(whole.numel() for whole in self.wholes.values())

    def _canonical(self, name: str, held: Tensor) -> Tensor:
        """A local tensor as a DTensor."""
        if self.tensor_axis is None:
            return held
        whole = self.wholes[name]
        return DTensor.from_local(
            held,
            self.tensor_axis,
            [self.placements[name]],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def _divide(model: nn.Module, placements: Mapping[str, Placement], tensor: DeviceMesh) -> None:
    """Parameters on the meta device become DTensors where the layout divides them, so that they are never whole."""
    for name, placement in placements.items():
        if isinstance(placement, Shard):
            owner, _, key = name.rpartition(".")
            whole = model.get_parameter(name)
            part = distribute_tensor(whole.detach(), tensor, [placement])
            model.get_submodule(owner).register_parameter(key, nn.Parameter(part, requires_grad=whole.requires_grad))
