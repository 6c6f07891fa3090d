"""What the tests of engines share: small models, the batches they train on, and what is compared of an engine."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.batch import Batch
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.noise import NoiseKey
from pretrain.engines.base import Engine, Micro
from pretrain.parallel.mesh import Mesh

LENGTH, VOCAB = 16, 21
"""21 tokens do not divide among processes."""
HELD_OUT = 99
"""The step whose rows are evaluated."""

MDLM = ModelConfig(
    backbone=TransformerConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, dropout=0.1),
    vocab_size=VOCAB,
    mask_id=VOCAB - 1,
)
LATENT = LatentConfig(dim=4, recognition=RecognitionConfig(num_layers=1, pool="gated"))
VADD = replace(MDLM, backbone=replace(MDLM.backbone, condition_dim=8, max_positions=LENGTH), latent=LATENT)
SYSTEMS = {
    "mdlm": MDLM,
    "untied": replace(MDLM, backbone=replace(MDLM.backbone, tie_embeddings=False, ffn="swiglu", norm="rmsnorm")),
    "timed": replace(
        MDLM, backbone=replace(MDLM.backbone, condition_dim=8, modulation="shared"), time_conditioning=True
    ),
    "vadd": VADD,
    "block_vmd": replace(VADD, block_size=4),
    "prior": replace(VADD, block_size=4, latent=replace(LATENT, prior="earlier_blocks")),
    "prior_x_t": replace(VADD, latent=replace(LATENT, prior="x_t")),
    "samples": replace(VADD, block_size=4, latent=replace(LATENT, num_samples=2)),
    "cadd": replace(MDLM, augmentation=AugmentationConfig(fusion="concat")),
    "all": replace(VADD, block_size=4, augmentation=AugmentationConfig(path="vp", fusion="reweight")),
}


def micros(mesh: Mesh, model: ModelConfig, step: int, *, rows: int, parts: int = 2) -> list[Micro]:
    """This rank's share of a step's `rows`, of two documents each, as so many micro-batches."""
    generator = torch.Generator().manual_seed(step)
    whole = Batch(
        tokens_BL=torch.randint(VOCAB - 1, (rows, LENGTH), generator=generator),
        maskable_BL=torch.rand(rows, LENGTH, generator=generator) < 0.9,
        document_BL=(torch.arange(LENGTH) >= 8).int().expand(rows, LENGTH),
        positions_BL=torch.arange(LENGTH).remainder(8).expand(rows, LENGTH),
        index_B=torch.arange(rows) + step * rows,
    )
    share = rows // mesh.data.size
    mine = whole.rows(mesh.data.rank * share, (mesh.data.rank + 1) * share)
    corruption = corrupt(mine, NoiseKey(3, step, mine.index_B), model)
    return Micro(mine, corruption, StepSchedule(kl_weight=0.7)).split(share // parts)


def backward(engine: Engine, model: ModelConfig, step: int, *, rows: int, parts: int = 2, factor: float = 1.0) -> float:
    """The micro-batches of a step, their gradients times a factor; the global loss per position."""
    mesh, share = engine.mesh, micros(engine.mesh, model, step, rows=rows, parts=parts)
    (count,) = mesh.data.all_reduce([sum(m.corruption.divisor for m in share)])
    terms = [engine.forward_backward(m, scale=factor / count, last=m is share[-1]) for m in share]
    (loss,) = mesh.sums.all_reduce([sum(float(t.loss) for t in terms)])
    return loss / count


def row_losses(engine: Engine, model: ModelConfig, *, rows: int) -> list[float]:
    """The loss of every held-out row, in order."""
    axis, share = engine.mesh.data, micros(engine.mesh, model, HELD_OUT, rows=rows)
    mine = torch.cat([engine.evaluate(m).loss_B for m in share]).double()
    place = torch.zeros(rows, dtype=torch.float64)
    place[axis.rank * len(mine) : (axis.rank + 1) * len(mine)] = mine
    return axis.all_reduce(place.tolist())


def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together from their parts, and copied."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in named.items()}


def whole_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Every tensor of the canonical state, put together and copied."""
    return {group: whole(named) for group, named in engine.state_dict().items()}
