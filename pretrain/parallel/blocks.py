"""What is done to a model's blocks before they are sharded: recomputation, compilation, division of the positions."""

from torch import nn

from model.latent import EarlierBlocksPrior
from model.layers import Block
from model.recompute import Recompute
from model.sequence import SequencePart, SequenceShard, Span
from model.transformer import Transformer

from .mesh import Axis


def prepare_blocks(model: nn.Module, *, recompute: Recompute, compile_blocks: bool) -> None:
    """Tells every trunk what to recompute in the backward pass, and compiles every block, one code for all layers."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recompute = recompute
        elif isinstance(module, Block) and compile_blocks:
            module.compile()


def divide_positions(model: nn.Module, context: Axis, tensor: Axis) -> None:
    """Gives every trunk over positions its part of them, and of that its shard between the products.

    A prior over the latents of blocks, whose rows grow block by block, stays whole.
    """
    whole = {module.trunk for module in model.modules() if isinstance(module, EarlierBlocksPrior)}
    for trunk in model.modules():
        if not isinstance(trunk, Transformer) or trunk in whole:
            continue
        if context.group is not None and context.size > 1:
            trunk.part = SequencePart(context.rank, context.size, context.group)
        if tensor.group is not None and tensor.size > 1:
            trunk.shard = SequenceShard(tensor.rank, tensor.size, tensor.group)
        for block in trunk.blocks:
            assert isinstance(block, Block)
            if trunk.part is not None or trunk.shard is not None:
                block.part = Span(context.rank * tensor.size + tensor.rank, context.size * tensor.size)
