"""Loss and gradient of the head: masked rows in chunks, against the plain full-logit cross-entropy.

Shapes: M rows, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from model.config import ModelConfig
from model.corruption import Corruption, corrupt
from model.losses import masked_linear_cross_entropy
from model.noise import NoiseKey

from .memory import peak_extra_bytes
from .timing import alternate

VOCABULARY, WIDTH, NUM_SEQUENCES, LENGTH = 151_936, 512, 16, 128
SETTINGS = {
    "vocabulary": VOCABULARY,
    "width": WIDTH,
    "rows": NUM_SEQUENCES * LENGTH,
    "precision": "fp32",
    "times": "uniform, stratified",
    "ratio_to": "torch.nn.functional.linear and cross_entropy on every position, masked by weight, same process",
}


def measure(repeats: int) -> dict[str, float]:
    """Ratios of time and of peak extra memory, and what they come from."""
    hidden_MD, head_VD, corruption = _inputs()

    def ours() -> Tensor:
        hidden_MD.grad = head_VD.grad = None
        rows_MD = hidden_MD.index_select(0, corruption.rows_M)
        loss, _ = masked_linear_cross_entropy(rows_MD, head_VD, corruption.targets_M, corruption.weight_M)
        loss.backward()
        return loss.detach()

    tokens, weight = _plain_targets(corruption)

    def plain() -> Tensor:
        hidden_MD.grad = head_VD.grad = None
        loss = (F.cross_entropy(F.linear(hidden_MD, head_VD), tokens, reduction="none") * weight).sum()
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-4)
    seconds, plain_seconds = alternate(ours, plain, repeats)
    memory, plain_memory = peak_extra_bytes(ours), peak_extra_bytes(plain)
    return {
        "head.time_ratio": seconds / plain_seconds,
        "head.memory_ratio": memory / plain_memory,
        "head.seconds": seconds,
        "head.plain_seconds": plain_seconds,
        "head.mib": memory / 2**20,
        "head.plain_mib": plain_memory / 2**20,
        "head.masked_fraction": corruption.num_masked / (NUM_SEQUENCES * LENGTH),
    }


def _inputs() -> tuple[Tensor, Tensor, Corruption]:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SEQUENCES, LENGTH)
    batch = Batch(
        tokens_BL=torch.randint(VOCABULARY - 1, shape, generator=generator),
        maskable_BL=torch.ones(shape, dtype=torch.bool),
        document_BL=torch.zeros(shape, dtype=torch.int32),
        positions_BL=torch.arange(LENGTH).expand(shape),
        index_B=torch.arange(NUM_SEQUENCES),
    )
    settings = ModelConfig(vocab_size=VOCABULARY, mask_id=VOCABULARY - 1)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), settings)
    hidden_MD = torch.randn(NUM_SEQUENCES * LENGTH, WIDTH, generator=generator, requires_grad=True)
    head_VD = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.02).requires_grad_()
    return hidden_MD, head_VD, corruption


def _plain_targets(corruption: Corruption) -> tuple[Tensor, Tensor]:
    """Targets and weights at every position, the weight 0 where nothing is masked."""
    tokens = torch.zeros(NUM_SEQUENCES * LENGTH, dtype=torch.int64)
    weight = torch.zeros(NUM_SEQUENCES * LENGTH)
    real = corruption.rows_M[: corruption.num_masked]
    tokens[real] = corruption.targets_M[: corruption.num_masked]
    weight[real] = corruption.weight_M[: corruption.num_masked]
    return tokens, weight
