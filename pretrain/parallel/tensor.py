"""Tensor and sequence parallel by DTensor: the declarative layout as styles of torch.distributed.tensor.parallel.

Between the products of a trunk over positions each process has its shard of them (norms, dropout, residuals): rows are
gathered once before a sublayer's column products and scattered as its row product is summed. That moves as much as
summing whole rows would, and keeps a fraction of them, so there is no tensor parallel without it.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from model.config import ModelConfig, TransformerConfig, recognition_backbone
from model.diffusion import MaskedDiffusion
from model.layers import Attention, FeedForward
from model.losses import VocabularySlice
from model.transformer import Transformer

from .layout import role_of


def divide_matrices(model: MaskedDiffusion, tensor: DeviceMesh) -> None:
    """Shards the matrices of a model (on any device, meta too) over an axis, and its head over the vocabulary.

    Raises:
        ValueError: heads, feed-forward width or switches that the axis can not divide.
    """
    refuse_indivisible(model.config, tensor.size())
    parallelize_module(model, tensor, _plan(model))
    for trunk in model.modules():
        if isinstance(trunk, Transformer):
            _divide_head(trunk, tensor)


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    for prefix, trunk in model.named_modules():
        if isinstance(trunk, Transformer):
            plan |= {f"{prefix}.{name}": style for name, style in _trunk_plan(prefix, trunk).items()}
    return plan


def _trunk_plan(prefix: str, trunk: Transformer) -> dict[str, ParallelStyle]:
    """By names within the trunk; where it divides positions, a sublayer gathers its input, the first of several."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in trunk.named_modules():
        weight = getattr(module, "weight", None)
        role = role_of(f"{prefix}.{name}.weight") if isinstance(weight, nn.Parameter) else None
        if role == "column":
            plan[name] = ColwiseParallel()
        elif role == "row":
            plan[name] = RowwiseParallel(output_layouts=Replicate() if trunk.shard is None else Shard(1))
        elif role == "vocab" and isinstance(module, nn.Embedding):
            plan[name] = RowwiseParallel(input_layouts=Replicate())
        elif isinstance(module, Attention | FeedForward) and trunk.shard is not None:
            others = (None,) * (3 if isinstance(module, Attention) else 0)
            plan[name] = PrepareModuleInput(
                input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others)
            )
    return plan


def partial_gradients(model: nn.Module) -> list[str]:
    """Parameters of which each process of the tensor axis has the gradient of its shard of the positions only."""
    return [
        f"{prefix}.{name}"
        for prefix, trunk in model.named_modules()
        if isinstance(trunk, Transformer) and trunk.shard is not None
        for name, _ in trunk.named_parameters()
        if role_of(f"{prefix}.{name}") == "sequence"
    ]


def _divide_head(trunk: Transformer, tensor: DeviceMesh) -> None:
    """The head is no module that is called: its rows meet the hidden states inside the cross-entropy."""
    if trunk.head is not None:
        trunk.head.weight = nn.Parameter(distribute_tensor(trunk.head.weight, tensor, [Shard(0)]))
    total = trunk.embed.num_embeddings
    rows = -(-total // tensor.size())
    if isinstance(trunk.embed.weight, DTensor):
        first = min(total, rows * tensor.get_local_rank())
        trunk.vocabulary = VocabularySlice(tensor.get_group(), first, total)


def refuse_indivisible(config: ModelConfig, size: int) -> None:
    """Raises ValueError where `size` processes can not divide the model's matrices among them."""
    backbone = config.backbone
    if not isinstance(backbone, TransformerConfig):
        raise ValueError("parallel.tensor > 1 needs a transformer: set backbone.kind=transformer, or parallel.tensor=1")
    if config.augmentation is not None and config.augmentation.mse_weight:
        raise ValueError(
            "augmentation.mse_weight needs all logits of a row in one process: set it to 0, or parallel.tensor=1"
        )
    trunks = {"model.backbone": backbone}
    if config.latent is not None:
        trunks["model.latent.recognition"] = recognition_backbone(config)
    for name, trunk in trunks.items():
        for key, value in (("num_kv_heads", trunk.kv_heads), ("ffn_dim", trunk.ffn_width)):
            if value % size:
                legal = [n for n in range(1, value + 1) if value % n == 0]
                raise ValueError(f"parallel.tensor={size} does not divide {name}.{key}={value}: use one of {legal[:8]}")
