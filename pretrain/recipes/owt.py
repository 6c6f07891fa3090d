"""OpenWebText in rows of 1,024 tokens of GPT-2 (VADD Section 5.3 and B.3, CADD Section 5.1, B.2 and C.1).

The data: one {"text": ...} a line for each document; then `penumbra tokenize openwebtext.jsonl --tokenizer
gpt2/tokenizer.json --validation-fraction 0.0125 --out data/owt`, a held-out share of 100K documents, chosen by hash
where the papers take the last. Documents follow each other in a row and do not see each other.

Readings where the papers contradict themselves or leave something open (docs/errata.md):
- CADD: 1M steps of 256 rows, 262B tokens; "about 2M steps" would be 524B. The rest is MDLM's. Sampling takes the hard
  estimate of z0 (Section 4.3); the MAUVE of 0.24 in Tables 8 and 10 can only be soft.
- CADD's ablations (Tables 8 to 10) are overrides of owt_cadd: model.augmentation.fusion=concat (or reweight),
  model.augmentation.path=vp, model.augmentation.mse_weight=1 with model.augmentation.z0=soft (or hard).
- VADD: 1M steps of 512 rows (its baseline is owt_mdlm with train.batch_tokens=524288), rate 3e-4 and KL over 100K steps
  (B.3), not 2e-4 and 200K (Section 5.3); width 768, not 784.
"""

from dataclasses import replace

from model.config import ModelConfig

from ..config import RunConfig
from ..data_config import ShardData
from . import Family
from .dit import SMALL, dit_small, with_hints, with_latent

CADD_BATCH, VADD_BATCH = 256 * 1024, 512 * 1024


def owt() -> Family:
    """Web pages in rows of 1,024 tokens, a DiT of 12 layers x 768 (VADD Tables 6 to 8, CADD Figures 3 and 4)."""
    further = _run(with_hints(SMALL, gated=True), steps=50_000_000_000 // CADD_BATCH)
    return {
        "ar": _run(ModelConfig(backbone=SMALL, autoregressive=True)),
        "mdlm": _run(ModelConfig(backbone=SMALL)),
        "vadd": _run(with_latent(SMALL, 512), batch_tokens=VADD_BATCH, kl_anneal_steps=100_000),
        "cadd": _run(with_hints(SMALL)),
        "cadd_from_mdlm": replace(further, init_from="runs/owt_mdlm"),
    }


def _run(model: ModelConfig, **train: int) -> RunConfig:
    base = dit_small()
    return replace(
        base,
        data=ShardData(path="data/owt", length=1024, num_workers=2),
        model=model,
        train=replace(base.train, **{"batch_tokens": CADD_BATCH, **train}),  # type: ignore[arg-type]
    )
