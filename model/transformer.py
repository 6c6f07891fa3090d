"""The one transformer: a DiT or a Qwen2/Llama-style decoder, by configuration.

Shapes: B sequences, L positions, D width, V vocabulary, M gathered rows, S condition segments, C condition width.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .attention import AttentionName, KVCache, prepare, refuse_device
from .config import TransformerConfig
from .layers import Block, TimeEmbedding, make_norm, modulate
from .losses import LinearCrossEntropy, VocabularySlice, masked_linear_cross_entropy
from .masks import MaskSpec
from .noise import Stream
from .recompute import Recompute, recomputed
from .rope import rotary_tables
from .sequence import SequencePart, SequenceShard


class Transformer(nn.Module):
    """Embeds tokens, runs the blocks under one mask description, and keeps the head apart."""

    def __init__(self, config: TransformerConfig, vocab_size: int, *, time_conditioning: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        self.attention_backend: AttentionName = "sdpa"
        self.vocabulary: VocabularySlice | None = None
        self.linear_cross_entropy: LinearCrossEntropy = masked_linear_cross_entropy
        self.part: SequencePart | None = None
        self.shard: SequenceShard | None = None
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.place = nn.Embedding(config.max_positions, config.dim) if config.max_positions else None
        self.time = TimeEmbedding(config.condition_dim) if time_conditioning else None
        conditioned = config.condition_dim > 0
        shared = conditioned and config.modulation == "shared"
        self.modulation = nn.Linear(config.condition_dim, config.num_modulated * config.dim) if shared else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.dim, affine=config.affine)
        self.final_modulation = nn.Linear(config.condition_dim, 2 * config.dim) if conditioned else None
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)

    def forward(
        self,
        x_t: Tensor,
        *,
        t: Tensor | None = None,
        mask: MaskSpec | None = None,
        hint: Tensor | None = None,
        condition: Tensor | None = None,
        applies: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        dropout: Stream | None = None,
        gather: bool = True,
    ) -> Tensor:
        """Hidden states [B, L, D], normalised and ready for `logits`.

        Args:
            x_t: token ids [B, L], or input embeddings [B, L, D].
            t: times [B] or [B, S], used when the model is time-conditioned.
            mask: what attention may see; default: everything.
            hint: added to the input embeddings, [B, L, D].
            condition: vectors [B or 1, C] or [B or 1, S, C], S dividing L, added to the time embedding.
            applies: positions [B, L] at which the condition acts, bool; default: all.
            cache: keys and values of earlier positions; this call's are appended unless it is frozen.
            positions: positions within the document [B or 1, L]; default: counted on from the cache.
            dropout: the stream to draw dropout from; None in evaluation.
            gather: whether processes that divide the positions all get all of them, or each its part [B, P, D].
        """
        x_BLD = x_t if x_t.is_floating_point() else self.embed(x_t)
        if hint is not None:
            x_BLD = x_BLD + hint
        num_cached = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(num_cached, num_cached + x_BLD.shape[1], device=x_BLD.device)[None]
        if self.place is not None:
            x_BLD = x_BLD + self.place(positions)
        plan = prepare(mask or MaskSpec(), x_BLD, num_cached, self.attention_backend, self.part)
        condition_BSC = self._condition(t, condition)
        if self.part is not None:
            x_BLD, positions = self.part.take(x_BLD), self.part.take(positions)
            condition_BSC = None if condition_BSC is None else self.part.take(condition_BSC)
            applies = None if applies is None else self.part.take(applies)
        rotary = rotary_tables(positions, self.config.head_width, self.config.rope_theta)
        if self.shard is not None:
            x_BLD = self.shard.split(x_BLD)
            condition_BSC = None if condition_BSC is None else self.shard.split_segments(condition_BSC)
            applies = None if applies is None else self.shard.split(applies)
        modulation = condition_BSC
        if self.modulation is not None and condition_BSC is not None:
            modulation = self.modulation(F.silu(condition_BSC))
        for layer, block in enumerate(self.blocks):
            run = partial(block, cache=cache, streams=self._dropout_streams(dropout, layer))
            kept = self.recompute if torch.is_grad_enabled() else "none"
            x_BLD = recomputed(run, kept)(x_BLD, rotary, plan, modulation, applies)
        hidden_BLD = self._final_norm(x_BLD, condition_BSC, applies)
        if self.shard is not None:
            hidden_BLD = self.shard.join(hidden_BLD)
        return self.part.gather(hidden_BLD) if self.part is not None and gather else hidden_BLD

    def _dropout_streams(self, dropout: Stream | None, layer: int) -> tuple[Stream | None, Stream | None]:
        """Of the two sublayers of a block."""
        if dropout is None or self.config.dropout == 0.0:
            return None, None
        return dropout.fold(2 * layer), dropout.fold(2 * layer + 1)

    def table(self) -> Tensor:
        """The token embeddings [V, D]; under a vocab-parallel layout this rank's rows of them."""
        return _local(self.embed.weight)

    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]; under a vocab-parallel layout this rank's rows of it."""
        return self.table() if self.head is None else _local(self.head.weight)

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """The head, on the rows you need: [M, V]. A transformer's head does not depend on which rows they are."""
        return F.linear(hidden_MD, self.head_weight())

    def cross_entropy(
        self, hidden_MD: Tensor, rows_M: Tensor, targets_M: Tensor, weight_M: Tensor, *, forbidden: int
    ) -> tuple[Tensor, Tensor]:
        """Head and loss in one, without their logits; see masked_linear_cross_entropy."""
        return self.linear_cross_entropy(
            hidden_MD, self.head_weight(), targets_M, weight_M, forbidden=forbidden, part=self.vocabulary
        )

    def _condition(self, t: Tensor | None, condition: Tensor | None) -> Tensor | None:
        if self.config.condition_dim == 0:
            if condition is not None:
                raise ValueError(
                    "this backbone has no conditioning path: set backbone.condition_dim to the vector's width"
                )
            return None
        total = None if condition is None else condition if condition.dim() == 3 else condition[:, None]
        if self.time is not None:
            if t is None:
                raise ValueError("a time-conditioned backbone needs t: pass times of shape [B]")
            embedded = self.time(t if t.dim() == 2 else t[:, None])
            total = embedded if total is None else total + embedded
        if total is None:
            raise ValueError("this backbone is conditioned: pass condition (or t, with time_conditioning=true)")
        return total

    def _final_norm(self, x_BLD: Tensor, condition_BSC: Tensor | None, applies_BL: Tensor | None) -> Tensor:
        x_BLD = self.norm(x_BLD)
        if self.final_modulation is None or condition_BSC is None:
            return x_BLD
        shift, scale = self.final_modulation(F.silu(condition_BSC)).chunk(2, dim=-1)
        return modulate(x_BLD, shift, scale, applies_BL)


def use_attention(model: nn.Module, name: AttentionName, device: torch.device) -> None:
    """Lets every transformer of a model that is trained on `device`, those of its latent too, attend by one backend.

    Raises:
        ValueError: the backend is not installed, or does not train there.
    """
    refuse_device(name, device, training=True)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.attention_backend = name


def _local(weight: Tensor) -> Tensor:
    """This rank's part of a matrix that a tensor-parallel layout divides."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
