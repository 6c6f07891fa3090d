"""The one sampling loop: predict, choose tokens, choose how many and which positions, reveal.

Shapes: B sequences, L positions, N positions of all rows, M masked ones, R of a chunk, V vocabulary, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.diffusion import MaskedDiffusion
from model.noise import Stream

from .amount import Amount, Even
from .choice import TokenChoice
from .order import OrderName, scores
from .state import SamplerState

CHUNK_ELEMENTS = 1 << 23
"""Most logits at once, R x V; a draw holds several float64 tensors of that size."""


@dataclass(frozen=True)
class Policies:
    """How a sampler decides: how many positions, which ones, and which tokens."""

    amount: Amount = Even()
    order: OrderName = "top_probability"
    choice: TokenChoice = TokenChoice()


@torch.inference_mode()
def sample(
    model: MaskedDiffusion,
    state: SamplerState,
    policies: Policies,
    steps: int,
    *,
    on_step: Callable[[SamplerState], None] | None = None,
) -> SamplerState:
    """Reveals every masked position in at most `steps` network calls.

    Each row's draws depend on its own index, so a sample is the same in any batch.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    while state.step < steps and bool(state.masked_BL.any()):
        state = _advance(model, state, policies, steps)
        if on_step is not None:
            on_step(state)
    return state


def _advance(model: MaskedDiffusion, state: SamplerState, policies: Policies, steps: int) -> SamplerState:
    masked_BL, key = state.masked_BL, replace(state.key, step=state.step)
    num_rows, length = masked_BL.shape
    t_B = torch.full((num_rows,), 1.0 - state.step / steps, dtype=torch.float64, device=masked_BL.device)
    hidden_BLD = model.denoise(state.tokens_BL, t=t_B)
    rows_M = masked_BL.flatten().nonzero()[:, 0]
    draws_M = key.stream("token").bits(length).flatten()[rows_M]
    random_M = key.stream("order").uniform(length).flatten()[rows_M]
    chosen_M, score_M = _choose(model, policies, hidden_BLD.flatten(0, 1), rows_M, draws_M, random_M)
    count_B = policies.amount(masked_BL, state.step, steps, key)
    revealed_BL = _top(score_M, rows_M, masked_BL, count_B)
    tokens_BL = state.tokens_BL.flatten().index_copy(0, rows_M, chosen_M).view_as(masked_BL)
    return state.reveal(revealed_BL, tokens_BL)


def _choose(
    model: MaskedDiffusion, policies: Policies, hidden_ND: Tensor, rows_M: Tensor, draws_M: Tensor, random_M: Tensor
) -> tuple[Tensor, Tensor]:
    """A token and a score for each masked row, a chunk of rows at a time."""
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    chosen, scored = [], []
    for rows_R, draws_R, random_R in zip(rows_M.split(size), draws_M.split(size), random_M.split(size), strict=True):
        log_probs_RV = model.logits(hidden_ND[rows_R], rows_R).log_softmax(1)
        chosen_R = policies.choice(log_probs_RV, Stream(draws_R))
        chosen.append(chosen_R)
        scored.append(scores(policies.order, log_probs_RV, chosen_R, random_R))
    return torch.cat(chosen), torch.cat(scored)


def _top(score_M: Tensor, rows_M: Tensor, masked_BL: Tensor, count_B: Tensor) -> Tensor:
    """The count_B masked positions of each row with the highest scores."""
    score_BL = torch.full(masked_BL.shape, -torch.inf, dtype=score_M.dtype, device=score_M.device)
    score_BL.view(-1)[rows_M] = score_M
    ranked_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    rank_BL = torch.arange(masked_BL.shape[1], device=rows_M.device).expand(masked_BL.shape)
    chosen_BL = torch.zeros_like(masked_BL).scatter(1, ranked_BL, rank_BL < count_B[:, None])
    return chosen_BL & masked_BL
