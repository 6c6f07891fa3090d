"""The z of a training step, one or several for each sequence, and what they cost.

Shapes: B sequences, S segments with a latent each, K samples of z, d latent width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .collapse import posterior_sums
from .latent import EarlierBlocksPrior, Gaussian


@dataclass(frozen=True)
class LatentDraw:
    """K samples of z and what each cost.

    Args:
        z_BSd: z of every segment, [K * B, S, d].
        kl_BS: the KL of each segment [K * B, S], of several samples their own log r(z) - log p(z); 0 where nothing is
            masked.
        posterior: what they are from, [B, S, d].
        num_samples: K.
    """

    z_BSd: Tensor
    kl_BS: Tensor
    posterior: Gaussian
    num_samples: int = 1

    def price(self, weight_BS: Tensor, log_share_BS: Tensor | None, kl_weight: float) -> Tensor:
        """What z adds to the loss of each sequence [K * B].

        Its KL and, of several samples, what is between the sum of their losses by share and -log mean exp(-loss).
        """
        priced_B = kl_weight * (weight_BS * self.kl_BS).sum(1)
        if log_share_BS is not None:
            priced_B = priced_B + (weight_BS * (log_share_BS + math.log(self.num_samples))).sum(1)
        return priced_B

    @torch.no_grad()
    def sums(self, hidden_BS: Tensor) -> Tensor:
        """What `collapse.latent_report` needs, of the segments [B, S] in which something is masked."""
        chosen = Gaussian(self.posterior.mean[hidden_BS], self.posterior.log_std[hidden_BS])
        first_BSd, kl_BS = self.z_BSd[: hidden_BS.shape[0]], self.kl_BS.unflatten(0, (self.num_samples, -1)).mean(0)
        return posterior_sums(chosen, first_BSd[hidden_BS], kl_BS[hidden_BS])


def divergence(posterior: Gaussian, prior: Gaussian, z: Tensor, *, closed_form: bool) -> Tensor:
    """KL(posterior, prior) [...], or what a draw of z from the posterior says of it."""
    return posterior.kl(prior).sum(-1) if closed_form else posterior.log_prob(z) - prior.log_prob(z)


def draw_in_turn(
    prior: EarlierBlocksPrior, posterior: Gaussian, hidden_BS: Tensor, noise_BSd: Tensor, *, closed_form: bool
) -> tuple[Tensor, Tensor]:
    """z [B, S, d] and its KL [B, S] block by block: the prior of each depends on what was drawn before it."""
    z_BSd, kl = noise_BSd[:, :0], []
    for block in range(noise_BSd.shape[1]):
        ahead = prior(z_BSd)
        here = Gaussian(ahead.mean[:, -1], ahead.log_std[:, -1])
        own = Gaussian(posterior.mean[:, block], posterior.log_std[:, block])
        z_Bd = own.where(hidden_BS[:, block], here).sample(noise_BSd[:, block])
        kl.append(torch.where(hidden_BS[:, block], divergence(own, here, z_Bd, closed_form=closed_form), 0.0))
        z_BSd = torch.cat((z_BSd, z_Bd[:, None]), dim=1)
    return z_BSd, torch.stack(kl, dim=1)
