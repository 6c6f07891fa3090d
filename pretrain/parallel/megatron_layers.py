"""Megatron-core's tensor-parallel layers in the places of a model that the declarative layout names.

Shapes: D width, F the divided outputs or inputs of a matrix, V vocabulary; "..." any.
"""

from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    linear_with_grad_accumulation_and_async_allreduce,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from model.config import ModelConfig
from model.diffusion import MaskedDiffusion
from model.losses import VocabularySlice
from model.transformer import Transformer

from .layout import role_of
from .megatron_loss import vocab_parallel_linear_cross_entropy

SETTINGS = ModelParallelConfig(
    perform_initialization=False, use_cpu_initialization=True, gradient_accumulation_fusion=False
)
"""Weights come from elsewhere, and no layer needs a CUDA extension."""


class _AsLinear:
    """What both linear layers lack to stand in for nn.Linear: a bias that is added, and autocast on any device.

    Megatron's own autocast decorators name CUDA. Its bias is kept apart (skip_bias_add), because under a frozen weight
    its function would give the bias no gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of every layer [..., inputs] to [..., outputs]."""
        out, bias = super().forward(x)  # type: ignore[misc]
        return out if bias is None else out + bias.to(out.dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            out: Tensor = super()._forward_impl(input=input, weight=weight, **settings)  # type: ignore[misc]
        return out


class ColumnLinear(_AsLinear, ColumnParallelLinear):
    """Divided outputs: [..., D] on every process to this one's [..., F]."""

    def __init__(self, whole: nn.Linear, group: ProcessGroup) -> None:
        super().__init__(
            whole.in_features,
            whole.out_features,
            bias=whole.bias is not None,
            gather_output=False,
            skip_bias_add=True,
            init_method=nn.init.zeros_,
            config=SETTINGS,
            tp_group=group,
        )


class RowLinear(_AsLinear, RowParallelLinear):
    """Divided inputs: this process's [..., F] to the sum [..., D] on every one."""

    def __init__(self, whole: nn.Linear, group: ProcessGroup) -> None:
        super().__init__(
            whole.in_features,
            whole.out_features,
            bias=whole.bias is not None,
            input_is_parallel=True,
            skip_bias_add=True,
            init_method=nn.init.zeros_,
            config=SETTINGS,
            tp_group=group,
        )

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        """A copy of the product: Megatron sums it in place, and selective recomputation has kept the product."""
        return super()._forward_impl(input, weight, **settings).clone()


class VocabEmbedding(VocabParallelEmbedding):
    """Divided rows: token ids [...] to [..., D], by a table whose last part may be shorter than the others."""

    def __init__(self, whole: nn.Embedding, group: ProcessGroup) -> None:
        size = group.size()
        super().__init__(
            -(-whole.num_embeddings // size) * size,
            whole.embedding_dim,
            init_method=nn.init.zeros_,
            config=SETTINGS,
            tp_group=group,
        )


def use_megatron_layers(model: MaskedDiffusion, group: ProcessGroup) -> None:
    """Replaces a model's layers by Megatron's, which take over its weights: whole ones, or its parts as DTensors.

    The layers keep their places and their parameters the canonical names. A head is no layer that is called: it becomes
    this process's rows, which meet the hidden states inside the cross-entropy.
    """
    if next(model.parameters()).device.type == "cpu":
        linear_with_grad_accumulation_and_async_allreduce.warned = True  # it advises on CUDA's queues
    for name, module in list(model.named_modules()):
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        made = _megatron_layer(role_of(f"{name}.weight"), module, group)
        for key, parameter in list(module.named_parameters(recurse=False)):
            local = parameter.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            made.register_parameter(key, nn.Parameter(local, requires_grad=parameter.requires_grad))
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, made)
    _divide_vocabulary(model, group)


def _megatron_layer(role: str, module: nn.Module, group: ProcessGroup) -> nn.Module:
    """The layer for a role, without weights; a module that is none of Megatron's business stays itself."""
    with torch.device("meta"):
        if isinstance(module, nn.Linear) and role == "column":
            return ColumnLinear(module, group)
        if isinstance(module, nn.Linear) and role == "row":
            return RowLinear(module, group)
        if isinstance(module, nn.Embedding) and role == "vocab":
            return VocabEmbedding(module, group)
    return module


def _divide_vocabulary(model: MaskedDiffusion, group: ProcessGroup) -> None:
    total = model.config.vocab_size
    part = VocabularySlice(group, -(-total // group.size()) * group.rank(), total)
    for trunk in model.modules():
        if isinstance(trunk, Transformer) and isinstance(trunk.embed, VocabEmbedding):
            trunk.vocabulary = part
            trunk.linear_cross_entropy = vocab_parallel_linear_cross_entropy


def refuse_empty_parts(config: ModelConfig, size: int) -> None:
    """Raises ValueError where a process would hold no token of the vocabulary."""
    total = config.vocab_size
    legal = [n for n in range(1, total + 1) if -(-total // n) * (n - 1) < total]
    if size not in legal:
        raise ValueError(
            f"parallel.tensor={size} leaves a process without any of the {total} tokens: use one of {legal[:8]}"
        )
