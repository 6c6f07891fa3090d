"""Samples of a trained run for a table, in batches that fit in memory.

Shapes: N samples, B of a batch, L positions.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eval.sampling.amount import Ancestral, Even
from eval.sampling.choice import TokenChoice
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.diffusion import MaskedDiffusion

BATCH = 4000

ARGMAX = Policies(Even(), "top_probability", TokenChoice(0.0))
CATEGORICAL = Policies(Even(), "top_probability", TokenChoice(1.0))
RANDOM = Policies(Even(), "random", TokenChoice(1.0))


def ancestral(model: MaskedDiffusion) -> Policies:
    """The reverse process itself: random positions, categorical draws, a fresh z at every step (VADD Algorithm 2)."""
    latent = "kept" if model.latent is None else "redrawn"
    return Policies(Ancestral(model.config.schedule), "random", TokenChoice(1.0), latent=latent)  # type: ignore[arg-type]


def draw(
    model: MaskedDiffusion, num: int, length: int, policies: Policies, steps: int, *, seed: int
) -> npt.NDArray[np.int64]:
    """`num` samples [N, L] from nothing."""
    tokens_NL = torch.full((num, length), model.config.mask_id)
    return complete(model, tokens_NL, torch.ones_like(tokens_NL, dtype=torch.bool), policies, steps, seed=seed)


def complete(
    model: MaskedDiffusion, tokens_NL: Tensor, masked_NL: Tensor, policies: Policies, steps: int, *, seed: int
) -> npt.NDArray[np.int64]:
    """Samples [N, L] of what is masked, given the rest; `steps` counts those of each block."""
    done = []
    for start in range(0, len(tokens_NL), BATCH):
        part = slice(start, start + BATCH)
        state = SamplerState.start(
            tokens_NL[part], masked_NL[part], mask_id=model.config.mask_id, seed=seed, first_index=start
        )
        done.append(sample(model, state, policies, steps).tokens_BL)
    return torch.cat(done).numpy()
