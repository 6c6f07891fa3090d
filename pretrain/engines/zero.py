"""What ZeRO's optimizers hold: flat float32 partitions that no name knows, and low-precision copies of them.

DeepSpeed has three of them, whose insides differ; here they look alike. All of it is DeepSpeed 0.19.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class Fragment:
    """This process's part of a parameter.

    Args:
        flat: which of the flat partitions holds it.
        offset: where it begins there.
        start: where it begins in the flattened parameter.
        numel: how many elements it has.
    """

    flat: int
    offset: int
    start: int
    numel: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """The part of flat partitions that it describes."""
        return flats[self.flat].narrow(0, self.offset, self.numel)


class Partitions(Protocol):
    """A ZeRO optimizer after the backward pass of the last micro-batch, when gradients are reduced but not clipped."""

    masters: Sequence[Tensor]

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Where this process keeps its part of a trained parameter; None: it has none."""

    def norm(self) -> Tensor:
        """Global gradient norm, infinite where it is not finite."""

    def discard(self) -> None:
        """Forgets the gradients, as after a step."""

    def refresh(self) -> None:
        """Copies the masters to the weights that the model computes with."""

    def set_frozen(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Sets a parameter that is not trained, of which there is no master."""


def partitions(optimizer: Any) -> Partitions:
    """The view on an optimizer that deepspeed.initialize has made."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return WeightPartitions(optimizer)
    return Bf16StatePartitions(optimizer) if isinstance(optimizer, BF16_Optimizer) else StatePartitions(optimizer)


class StatePartitions:
    """Stages 1 and 2: every process holds the weights in the precision of the computation."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.masters: Sequence[Tensor] = optimizer.single_partition_of_fp32_groups

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """See Partitions."""
        return _mapped(parameter)

    def norm(self) -> Tensor:
        """See Partitions."""
        norm: Tensor = self.optimizer.scaled_global_norm()
        return norm

    def discard(self) -> None:
        """See Partitions."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()

    def refresh(self) -> None:
        """See Partitions."""
        self.optimizer.update_lp_params()

    def set_frozen(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """See Partitions."""
        parameter.data.copy_(whole)


class Bf16StatePartitions(StatePartitions):
    """Stage 1 with float32 gradients of bfloat16 weights, which DeepSpeed leaves to another optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.masters = optimizer.fp32_groups_flat_partition

    def norm(self) -> Tensor:
        """See Partitions."""
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        gradients, _ = self.optimizer.get_grads_for_norm()
        norm = torch.as_tensor(get_global_norm_of_tensors(gradients))
        return torch.where(norm.isfinite() & (norm >= 0), norm, torch.inf)

    def discard(self) -> None:
        """See Partitions."""
        self.optimizer.zero_grad(set_to_none=True)


class WeightPartitions:
    """Stage 3: weights are partitioned as well, each by itself, and gathered around the modules that use them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.masters: Sequence[Tensor] = optimizer.fp32_partitioned_groups_flat

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """See Partitions."""
        held: Any = parameter
        flat, offset, numel = self.optimizer.grad_position[self.optimizer.get_param_id(held)]
        start = numel * held.ds_zero_partition_rank
        numel = min(numel, held.ds_numel - start)
        return Fragment(flat, offset, start, numel) if numel > 0 else None

    def norm(self) -> Tensor:
        """See Partitions."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm: Tensor = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        return norm

    def discard(self) -> None:
        """See Partitions."""
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer._overflow_clean_up(prev_scale=1.0)

    def refresh(self) -> None:
        """See Partitions."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def set_frozen(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """See Partitions."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)


def hide_gathering(optimizer: Any) -> None:
    """Gathers out of sight of selective recomputation, which wants to meet the same operators in both of its passes.

    When parameters are gathered and let go depends on what else is there at the time.
    """
    offload = optimizer.parameter_offload
    for when in ("pre", "post"):
        for way in ("forward", "backward"):
            name = f"{when}_sub_module_{way}_function"
            setattr(offload, name, _unseen(getattr(offload, name)))


def _unseen(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def run(module: nn.Module) -> None:
        with _disable_current_modes():
            function(module)

    return run


def _mapped(parameter: nn.Parameter) -> Fragment | None:
    """The place that stages 1 and 2 have noted at the parameter."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(mapping.param_group_index, there.start, here.start, here.numel)
