"""What is done to a model's blocks before they are sharded: recomputation, compilation, division of the positions."""

from torch import nn

from model.latent import EarlierBlocksPrior
from model.layers import Block
from model.recompute import Recompute
from model.sequence import SequencePart
from model.transformer import Transformer

from .mesh import Axis


def prepare_blocks(model: nn.Module, *, recompute: Recompute, compile_blocks: bool) -> None:
    """Tells every trunk what to recompute in the backward pass, and compiles every block, one code for all layers."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recompute = recompute
        elif isinstance(module, Block) and compile_blocks:
            module.compile()


def divide_positions(model: nn.Module, context: Axis) -> None:
    """Gives every trunk over positions its part of them; a prior over the latents of blocks stays whole."""
    if context.group is None or context.size == 1:
        return
    part = SequencePart(context.group, context.rank, context.size)
    whole = {module.trunk for module in model.modules() if isinstance(module, EarlierBlocksPrior)}
    for trunk in model.modules():
        if isinstance(trunk, Transformer) and trunk not in whole:
            trunk.part = part
            for block in trunk.blocks:
                assert isinstance(block, Block)
                block.part = part
