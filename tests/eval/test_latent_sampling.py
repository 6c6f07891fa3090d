"""Latents in the sampler: when z is drawn, from what, and what distribution of tokens follows, by quadrature."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.sampling.amount import Even
from eval.sampling.choice import TokenChoice
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.diffusion import MaskedDiffusion
from model.latent import Gaussian
from model.noise import NoiseKey

MASK, WIDTH, NUMBER, GRID = 4, 3, 40_000, 60
Tiny = Callable[..., MaskedDiffusion]
Blank = Callable[..., SamplerState]
Watch = Callable[[MaskedDiffusion], list[Any]]
Misfit = Callable[..., float]
Tokens = tuple[int, ...]
Distribution = dict[Tokens, float]

RANDOM = Policies(Even(), "random", TokenChoice())
LATENT = {"dim": WIDTH, "inject": "adaln"}


def with_latent(policy: str) -> Policies:
    return Policies(Even(), "random", TokenChoice(), latent=policy)  # type: ignore[arg-type]


def drawn(calls: list[Any]) -> Tensor:
    """z of the newest block at every call, [calls, B, d]."""
    return torch.stack([call.given["latent"][:, -1] for call in calls])


def noise(step: int, rows: int, *, width: int = WIDTH, seed: int = 0) -> Tensor:
    """What the draw of a step is made of."""
    return NoiseKey(seed, step, torch.arange(rows)).stream("latent").normal(width)


def test_a_kept_latent_is_the_same_at_every_step(tiny: Tiny, blank: Blank, watch: Watch) -> None:
    model = tiny(latent=LATENT)
    calls = watch(model)
    sample(model, blank(5, 8), with_latent("kept"), 4)
    z_CBd = drawn(calls)
    assert len(z_CBd) == 4
    assert torch.equal(z_CBd, noise(0, 5).expand(4, 5, WIDTH))


def test_a_kept_latent_is_one_for_each_block(tiny: Tiny, blank: Blank, watch: Watch) -> None:
    model = tiny(latent=LATENT, block_size=4)
    calls = watch(model)
    sample(model, blank(5, 8), Policies(choice=TokenChoice(), cache=False), 2)
    assert [call.given["latent"].shape[1] for call in calls] == [1, 1, 2, 2]
    z_CBd = drawn(calls)
    assert torch.equal(z_CBd, torch.stack([noise(0, 5), noise(0, 5), noise(2, 5), noise(2, 5)]))
    assert torch.equal(calls[-1].given["latent"][:, 0], noise(0, 5))


def test_a_redrawn_latent_is_fresh_at_every_step_whatever_their_number(tiny: Tiny, blank: Blank, watch: Watch) -> None:
    model = tiny(latent=LATENT)
    calls = watch(model)
    found = {}
    for steps in (4, 6):
        calls.clear()
        sample(model, blank(2000, 12), with_latent("redrawn"), steps)
        found[steps] = drawn(calls)
        assert len(found[steps]) == steps
    assert torch.equal(found[4], found[6][:4])
    per_step_SN = found[6].flatten(1)
    correlation_SS = torch.corrcoef(per_step_SN)
    assert float((correlation_SS - torch.eye(6)).abs().max()) < 5 / math.sqrt(per_step_SN.shape[1])
    assert float(per_step_SN.mean()) == pytest.approx(0, abs=5 / math.sqrt(per_step_SN.numel()))
    assert float(per_step_SN.std()) == pytest.approx(1, abs=5 / math.sqrt(per_step_SN.numel()))


@pytest.mark.parametrize("block_size", [0, 4])
def test_a_refreshed_latent_comes_from_the_second_look(
    tiny: Tiny, blank: Blank, watch: Watch, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """From step two on: r(z | x0_hat, x_t), x0_hat what the step before predicted, M what is still masked."""
    model = tiny(latent=LATENT, block_size=block_size)
    assert model.latent is not None
    looks: list[tuple[Tensor, Tensor, Gaussian]] = []
    recognition = model.latent.recognition

    class Spy(torch.nn.Module):
        def forward(self, tokens_BL: Tensor, masked_BL: Tensor, maskable_BL: Tensor, **given: Any) -> Gaussian:
            posterior: Gaussian = recognition(tokens_BL, masked_BL, maskable_BL, **given)
            looks.append((tokens_BL, masked_BL, posterior))
            return posterior

    monkeypatch.setattr(model.latent, "recognition", Spy())
    calls, logits = watch(model), list[Tensor]()
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda *given: logits.append(head(*given)) or logits[-1])
    states: list[SamplerState] = []
    greedy = Policies(Even(), "random", TokenChoice(0.0), latent="refreshed", cache=False)
    final = sample(model, blank(5, 8), greedy, 3, on_step=states.append)
    steps_of = [0, 1, 2] if block_size == 0 else [0, 1, 2, 3, 4, 5]
    z_CBd, number = drawn(calls), 0
    for call, step in enumerate(steps_of):
        if step % 3 == 0:
            assert torch.equal(z_CBd[call], noise(step, 5))
            continue
        tokens_BL, masked_BL, posterior = looks[number]
        number += 1
        before, stop = states[call - 1], tokens_BL.shape[1]
        own = slice(stop - (block_size or 8), stop)
        assert torch.equal(masked_BL[:, own], before.masked_BL[:, own])
        assert not masked_BL[:, : own.start].any()
        assert torch.equal(tokens_BL[~masked_BL], before.tokens_BL[:, :stop][~masked_BL])
        predicted_BR = torch.full((5, own.stop - own.start), MASK)
        earlier = states[call - 2].masked_BL if step % 3 > 1 else blank(5, 8).masked_BL
        predicted_BR[earlier[:, own]] = logits[call - 1].argmax(1)
        assert torch.equal(tokens_BL[:, own][masked_BL[:, own]], predicted_BR[masked_BL[:, own]])
        expected = posterior.mean[:, -1] + posterior.log_std[:, -1].exp() * noise(step, 5)
        torch.testing.assert_close(z_CBd[call], expected)
    assert number == len(looks) == len(steps_of) * 2 // 3
    assert not final.masked_BL.any()


def test_the_recognition_network_sleeps_unless_it_is_asked(
    tiny: Tiny, blank: Blank, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(latent=LATENT)
    assert model.latent is not None
    monkeypatch.setattr(model.latent, "recognition", None)
    for policy in ("kept", "redrawn"):
        sample(model, blank(2, 8), with_latent(policy), 4)
    with pytest.raises(TypeError):
        sample(model, blank(2, 8), with_latent("refreshed"), 4)


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("policy", ["kept", "redrawn", "refreshed"])
def test_a_sample_does_not_depend_on_its_batch(tiny: Tiny, blank: Blank, policy: str, point: bool) -> None:
    latent = {"dim": WIDTH, "inject": "embedding"}
    model, length = (tiny(point=True, latent=latent), 2) if point else (tiny(latent=latent), 8)
    whole = sample(model, blank(20, length), with_latent(policy), 4).tokens_BL
    parts = [
        sample(model, blank(n, length, first_index=f), with_latent(policy), 4).tokens_BL for f, n in ((0, 7), (7, 13))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sample(model, blank(20, length, seed=1), with_latent(policy), 4).tokens_BL, whole)


def test_the_three_policies_are_three_samplers(tiny: Tiny, blank: Blank) -> None:
    model = tiny(latent=LATENT)
    found = [sample(model, blank(50, 8), with_latent(p), 4).tokens_BL for p in ("kept", "redrawn", "refreshed")]
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)


# Quadrature: the distribution of tokens is an integral over z of dimension one.


def nodes(number: int = 400) -> tuple[Tensor, Tensor]:
    """Midpoints of a grid and their weights under N(0, 1)."""
    z_N = torch.linspace(-6, 6, number, dtype=torch.float64)
    weight_N = (-0.5 * z_N**2).exp()
    return z_N.float(), weight_N / weight_N.sum()


@torch.inference_mode()
def given_z(model: MaskedDiffusion, x: Tokens, z_NS: Tensor) -> Tensor:
    """Probabilities [N, L, V] of each symbol at each position, at N values of the latents of S blocks."""
    tokens_NL = torch.tensor([x]).expand(len(z_NS), -1)
    hidden = model.denoise(tokens_NL, latent=z_NS[:, :, None])
    flat = model.logits(hidden.flatten(0, 1), torch.arange(tokens_NL.numel()))
    return flat.double().softmax(1).view(*tokens_NL.shape, -1)


def product(table_NLV: Tensor, x: Tokens, positions: Iterable[int]) -> Tensor:
    """Probability [N] of the symbols of x at some positions, which are independent given z."""
    return torch.stack([table_NLV[:, i, x[i]] for i in positions]).prod(0)


def all_tokens(length: int) -> list[Tokens]:
    return list(itertools.product(range(4), repeat=length))


ONE = {"dim": 1, "inject": "embedding"}


@pytest.mark.parametrize("point", [False, True])
def test_one_step_samples_follow_the_mixture(tiny: Tiny, blank: Blank, misfit: Misfit, point: bool) -> None:
    model = tiny(latent=ONE, loud=0.15 if point else 0.6, point=point)
    z_N, weight_N = nodes()
    table_NLV = given_z(model, (MASK, MASK), z_N[:, None])
    mixture = {x: float(weight_N @ product(table_NLV, x, (0, 1))) for x in all_tokens(2)}
    found = sample(model, blank(NUMBER, 2), RANDOM, 1).tokens_BL
    assert misfit(found, mixture) < 5
    marginal_LV = (weight_N[:, None, None] * table_NLV).sum(0)
    untied = {x: float(marginal_LV[0, x[0]] * marginal_LV[1, x[1]]) for x in all_tokens(2)}
    assert misfit(found, untied) > 20


def two_steps(model: MaskedDiffusion, *, kept: bool) -> Distribution:
    """One token at a time, in either order, with one z for both or one for each."""
    (z_N, weight_N), found = nodes(), dict.fromkeys(all_tokens(2), 0.0)
    first_NLV = given_z(model, (MASK, MASK), z_N[:, None])
    for x, place in itertools.product(found, (0, 1)):
        seen = (x[0], MASK) if place == 0 else (MASK, x[1])
        first_N = product(first_NLV, x, (place,))
        second_N = product(given_z(model, seen, z_N[:, None]), x, (1 - place,))
        found[x] += 0.5 * float(
            weight_N @ (first_N * second_N) if kept else (weight_N @ first_N) * (weight_N @ second_N)
        )
    return found


def test_one_z_for_both_steps_and_one_for_each_are_two_samplers(tiny: Tiny, blank: Blank, misfit: Misfit) -> None:
    model = tiny(latent=ONE, loud=0.6)
    for kept in (True, False):
        found = sample(model, blank(NUMBER, 2), with_latent("kept" if kept else "redrawn"), 2).tokens_BL
        assert misfit(found, two_steps(model, kept=kept)) < 5
        assert misfit(found, two_steps(model, kept=not kept)) > 10


def test_a_prior_that_sees_x_t_is_where_z_comes_from(tiny: Tiny, blank: Blank, misfit: Misfit) -> None:
    """z redrawn behind the first token, from p(z | x_t)."""
    model = tiny(latent={**ONE, "prior": "x_t"}, loud=0.6)

    @torch.inference_mode()
    def spread(x: Tokens) -> Tensor:
        assert model.latent is not None
        prior = model.latent.prior(torch.tensor([x]), model.mask(), None, torch.ones(1, 2, dtype=torch.bool), 1)
        found: Tensor = prior.mean[0] + prior.log_std[0].exp() * nodes()[0][:, None]
        return found

    def expected(moved: Callable[[Tokens], Tensor]) -> Distribution:
        weight_N, found = nodes()[1], dict.fromkeys(all_tokens(2), 0.0)
        first_NLV = given_z(model, (MASK, MASK), moved((MASK, MASK)))
        for x, place in itertools.product(found, (0, 1)):
            seen = (x[0], MASK) if place == 0 else (MASK, x[1])
            second_N = product(given_z(model, seen, moved(seen)), x, (1 - place,))
            found[x] += 0.5 * float((weight_N @ product(first_NLV, x, (place,))) * (weight_N @ second_N))
        return found

    found = sample(model, blank(NUMBER, 2), with_latent("redrawn"), 2).tokens_BL
    assert misfit(found, expected(spread)) < 5
    assert misfit(found, expected(lambda x: spread((MASK, MASK)))) > 10


@pytest.mark.parametrize("prior", ["normal", "earlier_blocks"])
@pytest.mark.parametrize("inject", ["embedding", "adaln"])
def test_blocks_follow_their_chain_of_latents(
    tiny: Tiny, blank: Blank, misfit: Misfit, prior: str, inject: str
) -> None:
    """p(x1, x2) integrates z1 and z2: block two reads token one under z1, and z2 may depend on z1."""
    model = tiny(latent={"dim": 1, "inject": inject, "prior": prior}, block_size=1, loud=0.4)
    z_N, weight_N = nodes(GRID)
    first_N = z_N
    second_NN = z_N[None].expand(GRID, GRID)
    if prior == "earlier_blocks":
        assert model.latent is not None
        with torch.inference_mode():
            start = model.latent.prior(torch.zeros(1, 0, 1))
            first_N = start.mean[0, 0] + start.log_std[0, 0].exp() * z_N
            later = model.latent.prior(first_N[:, None, None])
            second_NN = later.mean[:, 1] + later.log_std[:, 1].exp() * z_N[None]
    both_N2 = torch.stack((first_N[:, None].expand(GRID, GRID), second_NN), dim=2).flatten(0, 1)
    first_NLV = given_z(model, (MASK,), first_N[:, None])
    expected = {}
    for x in all_tokens(2):
        second_NN1 = product(given_z(model, (x[0], MASK), both_N2), x, (1,)).view(GRID, GRID)
        expected[x] = float(weight_N @ (product(first_NLV, x, (0,)) * (second_NN1 @ weight_N)))
    for policy in ("kept", "redrawn"):
        found = sample(model, blank(NUMBER, 2), with_latent(policy), 1).tokens_BL
        assert misfit(found, expected) < 5
    assert misfit(found, {x[::-1]: p for x, p in expected.items()}) > 10


@pytest.mark.parametrize("policy", ["redrawn", "refreshed"])
def test_a_model_without_latent_refuses_to_draw_one(tiny: Tiny, blank: Blank, policy: str) -> None:
    with pytest.raises(ValueError, match=rf"latent={policy} needs a model with a latent.*use kept"):
        sample(tiny(), blank(1, 4), with_latent(policy), 2)
