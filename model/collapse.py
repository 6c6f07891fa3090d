"""Signs of posterior collapse: how much a latent says, in how many of its dimensions, and about how many samples.

Shapes: N segments, d latent width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .latent import Gaussian

ACTIVE_VARIANCE = 0.01
MOST_COMPARED = 256


@dataclass(frozen=True)
class LatentReport:
    """Over the segments in which something is masked.

    Args:
        kl: mean KL(posterior, prior), nats.
        active_units: dimensions whose posterior mean varies by more than 0.01 over the data (Burda et al. 2016).
        mutual_information: of z and what it was inferred from, nats, at most the log of the samples compared.
    """

    kl: float
    active_units: int
    mutual_information: float


@torch.no_grad()
def posterior_sums(posterior: Gaussian, z_Nd: Tensor, kl_N: Tensor) -> Tensor:
    """Sums over segments [4 + 2 d] from which `latent_report` follows; they add up over micro-batches and ranks."""
    mean_Nd = posterior.mean.double()
    few = slice(0, MOST_COMPARED)
    of_all_NN = Gaussian(posterior.mean[None, few], posterior.log_std[None, few]).log_prob(z_Nd[few, None])
    count = of_all_NN.shape[0]
    information = of_all_NN.diagonal() - of_all_NN.logsumexp(1) + math.log(max(1, count))
    scalars = (mean_Nd.shape[0], float(kl_N.sum()), float(information.sum()), count)
    return torch.cat((mean_Nd.new_tensor(scalars), mean_Nd.sum(0), mean_Nd.square().sum(0)))


def latent_report(sums: Tensor) -> LatentReport:
    """What the sums of `posterior_sums` say."""
    count, kl, information, compared = (max(0.0, value) for value in sums[:4].tolist())
    mean_d, square_d = (part / max(1.0, count) for part in sums[4:].chunk(2))
    active = int((square_d - mean_d.square() > ACTIVE_VARIANCE).sum())
    return LatentReport(kl / max(1.0, count), active, information / max(1.0, compared))
