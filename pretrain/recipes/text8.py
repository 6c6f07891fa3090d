"""text8, the first 100M characters of a Wikipedia in 27 symbols (VMD Section 4.4 and C.3, CADD Table 5).

The data: one {"text": ...} a line, of 65,535 characters each, which with their end token fill 256 rows; then
`penumbra tokenize text8.jsonl --tokenizer characters --out data/text8`. It holds out pieces by their hash, where the
papers test on the last 5M characters.

Readings where the papers contradict themselves or leave something open (docs/errata.md):
- The latent is heard by adaLN, as in VMD C.1; C.3 says "added to the data embedding in the same manner".
- VMD gives 8 layers and 8 heads; the width is that of MDLM's `tiny`, 512. Length of training, averaging, dropout and
  the annealing of the KL are not published: ours are those of VADD. No times are clipped.
- "Block size 256" is one block, the whole row.
- CADD follows others' settings at GPT-2 small's size, so its numbers (bits) and VMD's (perplexities) do not compare.
"""

from dataclasses import replace

from model.config import ModelConfig

from ..config import RunConfig
from ..data_config import ShardData
from . import Family
from .dit import SMALL, TINY, dit_small, with_hints, with_latent


def text8() -> Family:
    """Characters in rows of 256, a DiT of 8 layers x 512 (VMD Table 4)."""
    blocks = {f"bd3lm_{size}": _run(ModelConfig(backbone=TINY, block_size=size)) for size in (4, 8)}
    latents = {
        f"vmd_{size}": _run(with_latent(TINY, 128, recognition_layers=4, block_size=size), kl_anneal_steps=100_000)
        for size in (4, 8, 256)
    }
    return {
        "ar": _run(ModelConfig(backbone=TINY, autoregressive=True)),
        "mdlm": _run(ModelConfig(backbone=TINY)),
        **blocks,
        **latents,
        "cadd": _run(with_hints(TINY)),
    }


def text8_small() -> Family:
    """Characters in rows of 256, a DiT of 12 layers x 768 (CADD Table 5)."""
    return {
        "ar": _run(ModelConfig(backbone=SMALL, autoregressive=True)),
        "mdlm": _run(ModelConfig(backbone=SMALL)),
        "cadd": _run(with_hints(SMALL)),
    }


def _run(model: ModelConfig, *, kl_anneal_steps: int = 0) -> RunConfig:
    base = dit_small()
    return replace(
        base,
        data=ShardData(path="data/text8", length=256, num_workers=2),
        model=model,
        train=replace(base.train, batch_tokens=512 * 256, kl_anneal_steps=kl_anneal_steps),
    )
