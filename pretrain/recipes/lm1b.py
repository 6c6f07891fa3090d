"""The One Billion Word benchmark, three times: padded (VADD), packed (CADD) and in blocks (VMD).

The data: one {"text": ...} a line for each detokenised sentence; then
`penumbra tokenize lm1b.jsonl --tokenizer bert-base-uncased/tokenizer.json --out data/lm1b`. All three share it: whether
rows are padded or packed is decided in reading. It holds out sentences by their hash, not the standard test split.

Readings where the papers contradict themselves or leave something open (docs/errata.md):
- Padded rows hold one sentence; padding is neither hidden nor counted, so perplexities are per token of text. Packed
  rows hold several, which do not see each other. Perplexities of the three do not compare.
- VADD: rate 3e-4 and KL over 100K steps (B.3), not 2e-4 and 200K (Section 5.3); width 768, not 784.
- CADD follows the settings of MDLM: 512 rows of 128, 1M steps.
- VMD: rows of 128 (Section 4.4), not 256 (C.3, which is text8); model, latent and what is not published as in text8.
"""

from dataclasses import replace
from typing import Literal

from model.config import ModelConfig

from ..config import RunConfig
from ..data_config import ShardData
from . import Family
from .dit import SMALL, TINY, dit_small, with_hints, with_latent


def lm1b_padded() -> Family:
    """A sentence per row of 128 WordPieces, a DiT of 12 layers x 768 (VADD Table 5)."""
    return {
        "mdlm": _run("pad", ModelConfig(backbone=SMALL)),
        "vadd": _run("pad", with_latent(SMALL, 128), kl_anneal_steps=100_000),
    }


def lm1b_packed() -> Family:
    """Sentences end to end in rows of 128 WordPieces, a DiT of 12 layers x 768 (CADD Table 6)."""
    return {
        "ar": _run("concat", ModelConfig(backbone=SMALL, autoregressive=True)),
        "mdlm": _run("concat", ModelConfig(backbone=SMALL)),
        "cadd": _run("concat", with_hints(SMALL)),
    }


def lm1b_blocks() -> Family:
    """Sentences end to end in rows of 128 WordPieces, blocks of 4, a DiT of 8 layers x 512 (VMD Table 5)."""
    latent = with_latent(TINY, 128, recognition_layers=4, block_size=4)
    return {
        "bd3lm_4": _run("concat", ModelConfig(backbone=TINY, block_size=4)),
        "vmd_4": _run("concat", latent, kl_anneal_steps=100_000),
    }


def _run(pack: Literal["concat", "pad"], model: ModelConfig, *, kl_anneal_steps: int = 0) -> RunConfig:
    base = dit_small()
    return replace(
        base,
        data=ShardData(path="data/lm1b", length=128, pack=pack, num_workers=2),
        model=model,
        train=replace(base.train, batch_tokens=512 * 128, kl_anneal_steps=kl_anneal_steps),
    )
