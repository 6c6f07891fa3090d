"""The one sampling loop: predict, choose tokens, choose how many and which positions, reveal; block after block.

Shapes: B sequences, L positions, R positions of a block, M masked rows, V vocabulary, D width, K hints.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.diffusion import MaskedDiffusion
from model.noise import Stream

from .amount import Amount, Even
from .blocks import BlockView, blocks_of
from .choice import TokenChoice
from .hints import HintPolicy, average, begin_hints, next_hints
from .latents import LatentPolicy, begin_latent, next_latent
from .order import OrderName, scores
from .state import SamplerState

CHUNK_ELEMENTS = 1 << 23
"""Most logits at once, rows x V; a draw holds several float64 tensors of that size."""

OnStep = Callable[[SamplerState], None]


@dataclass(frozen=True)
class Policies:
    """How a sampler decides.

    Args:
        amount: how many positions a step reveals.
        order: which ones.
        choice: which tokens.
        latent: where z comes from after a block's first step.
        hints: how many hints, and their estimate of z0.
        cache: keep keys and values of finished blocks.
        stop_id: the token that ends a sequence; what follows the block it is in stays unwritten.
    """

    amount: Amount = Even()
    order: OrderName = "top_probability"
    choice: TokenChoice = TokenChoice()
    latent: LatentPolicy = "kept"
    hints: HintPolicy = HintPolicy()
    cache: bool = True
    stop_id: int | None = None


@torch.inference_mode()
def sample(
    model: MaskedDiffusion,
    state: SamplerState,
    policies: Policies,
    steps: int,
    *,
    on_step: OnStep | None = None,
) -> SamplerState:
    """Reveals every masked position, in at most `steps` steps a block (each one network call for every hint).

    Each row's draws depend on its own index, so a sample is the same in any batch.

    Raises:
        ValueError: fewer than one step, a policy that the model can not serve, or a canvas it has no blocks for.
    """
    refuse_unservable(model, state, policies, steps)
    active_B = torch.arange(state.tokens_BL.shape[0], device=state.tokens_BL.device)
    part = state
    for block in blocks_of(model, state.tokens_BL.shape[1], cached=policies.cache):
        part = begin_hints(model, begin_latent(model, part, block), block, policies.hints)
        for step in range(steps):
            if not bool(part.masked_BL[:, block.start : block.stop].any()):
                break
            if step:
                part = next_latent(model, part, block, policies.latent)
            part = _advance(model, part, policies, block, step, steps)
            state = state.with_tokens(active_B, part)
            if on_step is not None:
                on_step(state)
        part = replace(part, step=(block.index + 1) * steps)
        if block.stop < state.tokens_BL.shape[1]:
            part = block.remember(model, part)
        if policies.stop_id is not None:
            open_B = _unfinished(part, policies.stop_id, block)
            active_B, part = active_B[open_B], part.rows(open_B)
            if not len(active_B):
                break
    return _end(state, policies.stop_id)


def refuse_unservable(model: MaskedDiffusion, state: SamplerState, policies: Policies, steps: int) -> None:
    """Raises ValueError for policies that a model can not serve."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if policies.latent != "kept" and model.latent is None:
        raise ValueError(f"latent={policies.latent} needs a model with a latent, which this one has not: use kept")
    if policies.hints.num_hints > 1 and model.augmentation is None:
        raise ValueError(f"num_hints={policies.hints.num_hints} needs a model with augmentation: use 1")
    if model.config.autoregressive:
        most = int(state.masked_BL.sum(1).max()) if len(state.masked_BL) else 0
        mends = {
            f"order=left_to_right instead of {policies.order}": policies.order != "left_to_right",
            f"amount=even instead of {type(policies.amount).__name__.lower()}": not isinstance(policies.amount, Even),
            f"at least {most} steps instead of {steps}": steps < most,
        }
        if any(mends.values()):
            wanted = ", ".join(mend for mend, needed in mends.items() if needed)
            raise ValueError(f"an autoregressive model writes one token a step from left to right: use {wanted}")


def _advance(
    model: MaskedDiffusion, state: SamplerState, policies: Policies, block: BlockView, step: int, steps: int
) -> SamplerState:
    t, s, key = 1.0 - step / steps, 1.0 - (step + 1) / steps, state.step_key
    own = slice(block.start, block.stop)
    masked_BR = state.masked_BL[:, own]
    hints = [None] if state.hints_KBRD is None else list(state.hints_KBRD)
    hidden = [block.denoise(model, state, t, hint_BRD).flatten(0, 1) for hint_BRD in hints]
    rows_M = masked_BR.flatten().nonzero()[:, 0]
    length = state.masked_BL.shape[1]
    draws_M = key.stream("token").bits(length)[:, own].flatten()[rows_M]
    random_M = key.stream("order").uniform(length)[:, own].flatten()[rows_M]
    chosen_M, score_M, z0_MD = _choose(model, policies, hidden, rows_M, draws_M, random_M)
    count_B = policies.amount(masked_BR, step, steps, key)
    revealed_BR = _top(score_M, rows_M, masked_BR, count_B)
    guess_BR = state.tokens_BL[:, own].flatten().index_copy(0, rows_M, chosen_M).view_as(masked_BR)
    guess_BL = torch.cat((state.tokens_BL[:, : block.start], guess_BR, state.tokens_BL[:, block.stop :]), dim=1)
    revealed_BL = torch.zeros_like(state.masked_BL)
    revealed_BL[:, own] = revealed_BR
    return next_hints(model, replace(state, guess_BL=guess_BL), z0_MD, rows_M, t, s).reveal(revealed_BL, guess_BL)


def _choose(
    model: MaskedDiffusion,
    policies: Policies,
    hidden: list[Tensor],
    rows_M: Tensor,
    draws_M: Tensor,
    random_M: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A token, a score and (with hints) an estimate of z0 for each masked row, a chunk of rows at a time."""
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    chosen, scored, estimates = [], [], []
    for rows_R, draws_R, random_R in zip(rows_M.split(size), draws_M.split(size), random_M.split(size), strict=True):
        log_probs_RV = average([model.logits(of_hint[rows_R], rows_R).log_softmax(1) for of_hint in hidden])
        chosen_R = policies.choice(log_probs_RV, Stream(draws_R))
        chosen.append(chosen_R)
        scored.append(scores(policies.order, log_probs_RV, chosen_R, random_R, rows_R))
        if model.augmentation is not None:
            table_VD = model.denoiser.embed.weight
            estimates.append(model.augmentation.estimate(log_probs_RV, table_VD, policies.hints.z0))
    return torch.cat(chosen), torch.cat(scored), torch.cat(estimates or [torch.empty(0)])


def _top(score_M: Tensor, rows_M: Tensor, masked_BR: Tensor, count_B: Tensor) -> Tensor:
    """The count_B masked positions of each row with the highest scores."""
    score_BR = torch.full(masked_BR.shape, -torch.inf, dtype=score_M.dtype, device=score_M.device)
    score_BR.view(-1)[rows_M] = score_M
    ranked_BR = score_BR.argsort(dim=1, descending=True, stable=True)
    rank_BR = torch.arange(masked_BR.shape[1], device=rows_M.device).expand(masked_BR.shape)
    chosen_BR = torch.zeros_like(masked_BR).scatter(1, ranked_BR, rank_BR < count_B[:, None])
    return chosen_BR & masked_BR


def _unfinished(state: SamplerState, stop_id: int, block: BlockView) -> Tensor:
    """Indices of the sequences that have not written the end token in what was theirs to write."""
    own = slice(block.start, block.stop)
    ended_B = ((state.tokens_BL[:, own] == stop_id) & state.maskable_BL[:, own]).any(1)
    return (~ended_B).nonzero()[:, 0]


def _end(state: SamplerState, stop_id: int | None) -> SamplerState:
    """Positions that a finished sequence left unwritten become end tokens."""
    if stop_id is None:
        return state
    tokens_BL = state.tokens_BL.masked_fill(state.masked_BL, stop_id)
    return replace(state, tokens_BL=tokens_BL, masked_BL=torch.zeros_like(state.masked_BL))
