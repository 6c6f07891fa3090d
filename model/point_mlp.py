"""Perceptrons over a few categorical dimensions: the denoiser and the recognition network of the 2D toys (VADD B.1).

As printed, a position would hear nothing of the others; here each dimension has a table of its own, the embeddings are
summed, and each has an output layer of its own (docs/errata.md).

Shapes: B samples, L dimensions (positions), D width, V vocabulary, M gathered rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache
from .config import PointMlpConfig
from .layers import TimeEmbedding
from .masks import MaskSpec
from .noise import Stream


class DimensionEmbedding(nn.Embedding):
    """One table per dimension, in one matrix [L V, D]."""

    def __init__(self, num_dimensions: int, vocab_size: int, dim: int) -> None:
        super().__init__(num_dimensions * vocab_size, dim)
        self.vocab_size = vocab_size

    def forward(self, tokens_BL: Tensor) -> Tensor:
        offset_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) * self.vocab_size
        return super().forward(tokens_BL + offset_L)


class Layers(nn.Module):
    """Linear layers of one width, an ELU after each."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))

    def forward(self, x_BD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BD = F.elu(layer(x_BD))
        return x_BD


class PointMlp(nn.Module):
    """The denoiser: summed embeddings of all dimensions (and of t), hidden layers, one output layer per dimension."""

    def __init__(self, config: PointMlpConfig, vocab_size: int, *, time_conditioning: bool = False) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed = DimensionEmbedding(config.num_dimensions, vocab_size, config.dim)
        self.time = TimeEmbedding(config.dim) if time_conditioning else None
        self.layers = Layers(config.dim, config.num_layers)
        self.head = nn.Linear(config.dim, config.num_dimensions * vocab_size)

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
    ) -> Tensor:
        """Hidden states [B, L, D], the same at every position: the head tells them apart."""
        x_BLD = x_t if x_t.is_floating_point() else self.embed(x_t)
        if hint is not None:
            x_BLD = x_BLD + hint
        x_BD = x_BLD.sum(1)
        if self.time is not None:
            assert t is not None, "a time-conditioned point_mlp needs t"
            x_BD = x_BD + self.time(t.reshape(t.shape[0], -1)[:, 0])
        hidden_BD: Tensor = self.layers(x_BD)
        return hidden_BD[:, None].expand(x_BLD.shape)

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """Logits [M, V] from the output layer of each row's own dimension."""
        assert rows_M is not None, "a point_mlp's head depends on the dimension: pass rows_M"
        num_dimensions = self.config.num_dimensions
        all_MLV = self.head(hidden_MD).unflatten(1, (num_dimensions, self.vocab_size))
        return all_MLV[torch.arange(rows_M.numel(), device=rows_M.device), rows_M % num_dimensions]

    def cross_entropy(
        self, hidden_MD: Tensor, rows_M: Tensor, targets_M: Tensor, weight_M: Tensor, *, forbidden: int
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies and each row's own, through plain logits: the vocabulary is small."""
        logits_MV = self.logits(hidden_MD, rows_M).float()
        column = torch.arange(self.vocab_size, device=logits_MV.device)
        logits_MV = logits_MV.masked_fill(column == forbidden, -torch.inf)
        safe_M = torch.where(weight_M == 0, (forbidden + 1) % self.vocab_size, targets_M)
        ce_M = F.cross_entropy(logits_MV, safe_M, reduction="none").masked_fill(weight_M == 0, 0.0)
        return (ce_M * weight_M).sum(), ce_M.detach()


class SiameseMlp(nn.Module):
    """One perceptron reads x0 and xt, each with t; the average of its outputs goes through a last layer."""

    def __init__(self, config: PointMlpConfig, vocab_size: int) -> None:
        super().__init__()
        self.dim = config.dim
        self.embed = DimensionEmbedding(config.num_dimensions, vocab_size, config.dim)
        self.time = TimeEmbedding(config.dim)
        self.layers = Layers(config.dim, config.num_layers)
        self.join = nn.Linear(config.dim, config.dim)

    def forward(self, x_0_BL: Tensor, x_t_BL: Tensor, t_B: Tensor) -> Tensor:
        """Hidden states [B, D]."""
        time_BD = self.time(t_B)
        both = [self.layers(self.embed(x_BL).sum(1) + time_BD) for x_BL in (x_0_BL, x_t_BL)]
        hidden_BD: Tensor = F.elu(self.join((both[0] + both[1]) / 2))
        return hidden_BD
