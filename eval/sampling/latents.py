"""Where a sampler's z comes from: the prior, drawn once or at every step, or the recognition network's second look.

Shapes: B sequences, L positions, S blocks begun, d latent width.
"""

from dataclasses import replace
from typing import Literal

import torch

from model.diffusion import MaskedDiffusion
from model.latent import EarlierBlocksPrior, Gaussian, standard_normal
from model.masks import MaskSpec

from .blocks import BlockView
from .state import SamplerState

LatentPolicy = Literal["kept", "redrawn", "refreshed"]
"""kept: one z for a sequence or block (VMD); redrawn: a fresh one every step (VADD); refreshed: after the first step
from r(z | x0_hat, x_t) (VMD E.4)."""


def begin_latent(model: MaskedDiffusion, state: SamplerState, block: BlockView) -> SamplerState:
    """Draws the z of a block that begins."""
    if model.latent is None:
        return state
    earlier = state.latent_BSd
    if earlier is None:
        earlier = torch.zeros(state.tokens_BL.shape[0], 0, model.latent.dim, device=state.tokens_BL.device)
    return _draw(model, replace(state, latent_BSd=earlier), prior_of(model, state, block))


def next_latent(model: MaskedDiffusion, state: SamplerState, block: BlockView, policy: LatentPolicy) -> SamplerState:
    """The z of a later step of the same block; rows that have finished it keep theirs."""
    if model.latent is None or policy == "kept":
        return state
    assert state.latent_BSd is not None
    shortened = replace(state, latent_BSd=state.latent_BSd[:, :-1])
    source = prior_of if policy == "redrawn" else _posterior
    drawn = _draw(model, shortened, source(model, shortened, block))
    assert drawn.latent_BSd is not None
    open_B = state.masked_BL[:, block.start : block.stop].any(1)
    return replace(state, latent_BSd=torch.where(open_B[:, None, None], drawn.latent_BSd, state.latent_BSd))


def prior_of(model: MaskedDiffusion, state: SamplerState, block: BlockView) -> Gaussian:
    """The prior [B, d] of a block's z, given what the sampler knows."""
    assert model.latent is not None
    prior = model.latent.prior
    if prior is None:
        return standard_normal(state.tokens_BL.shape[0], model.latent.dim, device=state.tokens_BL.device)
    if isinstance(prior, EarlierBlocksPrior):
        earlier = state.latent_BSd
        if earlier is None:
            earlier = torch.zeros(state.tokens_BL.shape[0], 0, model.latent.dim, device=state.tokens_BL.device)
        return _last(prior(earlier))
    spec = MaskSpec(block_size=model.config.block_size)
    return _last(
        prior(state.tokens_BL[:, : block.stop], spec, None, state.maskable_BL[:, : block.stop], block.index + 1)
    )


def _posterior(model: MaskedDiffusion, state: SamplerState, block: BlockView) -> Gaussian:
    """r(z | x0_hat, x_t) [B, d]: the newest prediction stands for x0, what is still masked for M."""
    assert model.latent is not None
    assert state.guess_BL is not None
    masked_BL = state.masked_BL[:, : block.stop].clone()
    masked_BL[:, : block.start] = False
    tokens_BL = torch.where(masked_BL, state.guess_BL[:, : block.stop], state.tokens_BL[:, : block.stop])
    num_segments = block.index + 1
    t_BS = masked_BL.unflatten(1, (num_segments, -1)).double().mean(2)
    return _last(
        model.latent.recognition(
            tokens_BL, masked_BL, state.maskable_BL[:, : block.stop], t_BS=t_BS, num_segments=num_segments
        )
    )


def _last(gaussian: Gaussian) -> Gaussian:
    return Gaussian(gaussian.mean[:, -1], gaussian.log_std[:, -1])


def _draw(model: MaskedDiffusion, state: SamplerState, source: Gaussian) -> SamplerState:
    assert model.latent is not None
    assert state.latent_BSd is not None
    z_Bd = source.sample(state.step_key.stream("latent").normal(model.latent.dim))
    return replace(state, latent_BSd=torch.cat((state.latent_BSd, z_Bd[:, None]), dim=1))
