"""Signs of collapse against direct formulas."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from model import collapse
from model.collapse import latent_report, posterior_sums
from model.latent import Gaussian


def posterior_of(num: int, dim: int, seed: int = 0, *, spread: float = 1.0) -> tuple[Gaussian, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, log_std, noise = (torch.randn(num, dim, generator=generator) for _ in range(3))
    gaussian = Gaussian(spread * mean, 0.3 * log_std - 1.0)
    return gaussian, gaussian.sample(noise), torch.rand(num, generator=generator)


def mutual_information(gaussian: Gaussian, z_Nd: Tensor) -> float:
    """Mean over samples of log r(z_i | x_i) - log mean_j r(z_i | x_j), pair by pair."""
    count, total = len(z_Nd), 0.0
    for i in range(count):
        logs = [
            Normal(gaussian.mean[j], gaussian.log_std[j].exp()).log_prob(z_Nd[i]).sum().item() for j in range(count)
        ]
        total += logs[i] - math.log(sum(map(math.exp, logs)) / count)
    return total / count


def test_the_report_is_what_the_formulas_say() -> None:
    gaussian, z_Nd, kl_N = posterior_of(40, 3)
    gaussian.mean[:, 1] = 3.0 + 0.02 * gaussian.mean[:, 1]  # far from zero, yet always there: inactive
    z_Nd = gaussian.sample(torch.randn(40, 3, generator=torch.Generator().manual_seed(3)))
    report = latent_report(posterior_sums(gaussian, z_Nd, kl_N))
    assert report.kl == pytest.approx(kl_N.mean().item(), rel=1e-6)
    assert report.active_units == 2 == int((gaussian.mean.var(0, correction=0) > 0.01).sum())
    assert report.mutual_information == pytest.approx(mutual_information(gaussian, z_Nd), rel=1e-4)


def test_halves_add_up() -> None:
    gaussian, z_Nd, kl_N = posterior_of(50, 4)
    parts = []
    for part in (slice(0, 20), slice(20, 50)):
        parts.append(posterior_sums(Gaussian(gaussian.mean[part], gaussian.log_std[part]), z_Nd[part], kl_N[part]))
    whole, both = latent_report(posterior_sums(gaussian, z_Nd, kl_N)), latent_report(parts[0] + parts[1])
    assert both.kl == pytest.approx(whole.kl, rel=1e-6)
    assert both.active_units == whole.active_units
    shares = [latent_report(part).mutual_information for part in parts]
    assert both.mutual_information == pytest.approx((20 * shares[0] + 30 * shares[1]) / 50, rel=1e-6)


def test_a_collapsed_posterior_says_nothing() -> None:
    collapsed = Gaussian(torch.zeros(64, 5), torch.zeros(64, 5))
    z_Nd = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    report = latent_report(posterior_sums(collapsed, z_Nd, torch.zeros(64)))
    assert (report.kl, report.active_units) == (0.0, 0)
    assert report.mutual_information == pytest.approx(0.0, abs=1e-5)


def test_posteriors_far_apart_tell_every_sample() -> None:
    gaussian, z_Nd, kl_N = posterior_of(64, 5, spread=100.0)
    report = latent_report(posterior_sums(gaussian, z_Nd, kl_N))
    assert report.active_units == 5
    assert report.mutual_information == pytest.approx(math.log(64), rel=1e-3)


def test_only_so_many_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    gaussian, z_Nd, kl_N = posterior_of(30, 2)
    monkeypatch.setattr(collapse, "MOST_COMPARED", 10)
    report = latent_report(posterior_sums(gaussian, z_Nd, kl_N))
    few = Gaussian(gaussian.mean[:10], gaussian.log_std[:10])
    assert report.mutual_information == pytest.approx(mutual_information(few, z_Nd[:10]), rel=1e-4)
    assert report.kl == pytest.approx(kl_N.mean().item(), rel=1e-6)


def test_no_segment_reports_zeros() -> None:
    sums = posterior_sums(Gaussian(torch.zeros(0, 3), torch.zeros(0, 3)), torch.zeros(0, 3), torch.zeros(0))
    assert sums.tolist() == [0.0] * 10
    report = latent_report(sums)
    assert (report.kl, report.active_units, report.mutual_information) == (0.0, 0, 0.0)
