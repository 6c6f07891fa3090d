"""Continuous hints in the sampler, against Algorithm 2 of CADD written out once more (with docs/errata.md)."""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from eval.sampling.amount import Ancestral, Even
from eval.sampling.choice import TokenChoice
from eval.sampling.hints import HintPolicy, average
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.augmentation import Augmentation
from model.config import ScheduleConfig
from model.diffusion import MaskedDiffusion
from model.noise import NoiseKey, Stream

MASK, WIDTH, LENGTH = 4, 16, 6
Tiny = Callable[..., MaskedDiffusion]
Blank = Callable[..., SamplerState]
Watch = Callable[[MaskedDiffusion], list[Any]]


def with_hints(num_hints: int, z0: Literal["soft", "hard"] = "soft", **changes: Any) -> Policies:
    settings = {"amount": Ancestral(ScheduleConfig()), "order": "random", "choice": TokenChoice()}
    return Policies(**{**settings, **changes}, hints=HintPolicy(num_hints, z0))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What every move along the continuous path was given: z_t, z0, t, s, noise."""
    seen: list[dict[str, Tensor]] = []
    step = Augmentation.step

    def recording(self: Augmentation, z_t: Tensor, z0: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        seen.append({"z_t": z_t, "z0": z0, "t": t, "s": s, "noise": noise})
        return step(self, z_t, z0, t, s, noise)

    monkeypatch.setattr(Augmentation, "step", recording)
    return seen


class PlainSampler:
    """CADD's Algorithm 2 for one sequence: pure Python over positions, float64; its noise is handed to it.

    Hints keep their places: z[k][i] is the hint of position i in trajectory k.
    """

    def __init__(self, model: MaskedDiffusion, path: str, fusion: str, z0: str, num_hints: int) -> None:
        self.model, self.path, self.fusion, self.z0, self.num_hints = model, path, fusion, z0, num_hints
        table_VD = model.denoiser.embed.weight.detach().double()
        rms_V1 = table_VD.square().mean(1, keepdim=True).sqrt()
        ratio = 0.4 / 0.6 if path == "flow_matching" else math.tan(math.pi * 0.4 / 2)
        self.clean_VD = table_VD / rms_V1 * ratio * math.sqrt(2 * math.log(MASK + 1) / WIDTH)
        self.table_VD, self.loudness = table_VD, float(table_VD.square().mean().sqrt())

    def run(self, key: NoiseKey, steps: int, first_KLD: Tensor, noise_SKLD: list[Tensor]) -> list[list[int]]:
        """The tokens after every step."""
        x, z, history = [MASK] * LENGTH, first_KLD.double().tolist(), []
        for number in range(steps):
            t, s = 1 - number / steps, 1 - (number + 1) / steps
            prediction_LV = self.predict(x, z, t)
            masked = [i for i in range(LENGTH) if x[i] == MASK]
            revealed = self.flipped(NoiseKey(key.seed, number, key.index_B), masked, (t - s) / t)
            gumbels_LV = self.gumbels(NoiseKey(key.seed, number, key.index_B))
            for i in masked:
                z0_D = self.estimate(prediction_LV[i])
                if i in revealed:
                    noisy_V = prediction_LV[i].log() + gumbels_LV[i]
                    x[i] = int(noisy_V.argmax())
                elif s > 0:
                    for k in range(self.num_hints):
                        z[k][i] = self.move(
                            torch.tensor(z[k][i]), z0_D, t, s, noise_SKLD[number][k, i].double()
                        ).tolist()
            history.append(list(x))
        return history

    def predict(self, x: list[int], z: list[Any], t: float) -> Tensor:
        """The mean over hints of the network's predictions, [L, V]."""
        total_LV = torch.zeros(LENGTH, MASK + 1, dtype=torch.float64)
        for hints in z:
            rows = [
                self.table_VD[x[i]] if x[i] != MASK else self.fused(torch.tensor(hints[i]), t) for i in range(LENGTH)
            ]
            hidden_LD = self.model.denoiser(torch.stack(rows)[None].float())[0]
            logits_LV = self.model.denoiser.logits(hidden_LD).double()
            logits_LV[:, MASK] = -math.inf
            total_LV += logits_LV.softmax(1) / self.num_hints
        return total_LV

    def fused(self, z_D: Tensor, t: float) -> Tensor:
        mask_D, hint_D = self.table_VD[MASK], z_D.double() * self.loudness
        if self.fusion == "reweight":
            return t * mask_D + (1 - t) * hint_D
        if self.fusion == "concat":
            assert self.model.augmentation is not None
            assert self.model.augmentation.projection is not None
            both_D: Tensor = self.model.augmentation.projection.weight.double() @ torch.cat((mask_D, hint_D))
            return both_D
        return mask_D + hint_D

    def estimate(self, prediction_V: Tensor) -> Tensor:
        """Eq. 21."""
        if self.z0 == "hard":
            return self.clean_VD[int(prediction_V.argmax())]
        expected_D: Tensor = sum(p * row for p, row in zip(prediction_V, self.clean_VD, strict=True))  # type: ignore[assignment]
        return expected_D

    def move(self, z_D: Tensor, z0_D: Tensor, t: float, s: float, noise_D: Tensor) -> Tensor:
        """Eq. 17 where the path preserves variance; else Bayes' rule on z_s ~ N(a_s z0, b_s^2), z_t given z_s."""
        if self.path == "vp":
            gbar_t, gbar_s = (math.cos(math.pi * u / 2) ** 2 for u in (t, s))
            gamma = gbar_t / gbar_s
            mean_D = math.sqrt(gbar_s) * (1 - gamma) / (1 - gbar_t) * z0_D
            mean_D = mean_D + math.sqrt(gamma) * (1 - gbar_s) / (1 - gbar_t) * z_D
            return mean_D + math.sqrt((1 - gbar_s) / (1 - gbar_t) * (1 - gamma)) * noise_D
        slope, variance = (1 - t) / (1 - s), t**2 - ((1 - t) / (1 - s)) ** 2 * s**2
        precision = 1 / s**2 + slope**2 / variance
        mean_D = ((1 - s) / s**2 * z0_D + slope / variance * z_D) / precision
        return mean_D + noise_D / math.sqrt(precision)

    def flipped(self, key: NoiseKey, masked: list[int], flip: float) -> set[int]:
        """Each masked position with probability rho_flip; which ones, by the sampler's own draws."""
        draws = key.stream("amount").uniform(LENGTH)[0].tolist()
        count = sum(draws[i] < flip or flip > 1 - 1e-12 for i in masked)
        ranks = key.stream("order").uniform(LENGTH)[0].tolist()
        return set(sorted(masked, key=lambda i: -ranks[i])[:count])

    def gumbels(self, key: NoiseKey) -> Tensor:
        return Stream(key.stream("token").bits(LENGTH)[0]).gumbel(MASK + 1)


@pytest.mark.parametrize("num_hints", [1, 3])
@pytest.mark.parametrize("z0", ["soft", "hard"])
@pytest.mark.parametrize(
    ("path", "fusion"),
    [("flow_matching", "add"), ("vp", "add"), ("flow_matching", "reweight"), ("vp", "concat")],
)
def test_the_loop_is_algorithm_two(
    tiny: Tiny,
    blank: Blank,
    watch: Watch,
    moves: list[dict[str, Tensor]],
    path: str,
    fusion: str,
    z0: Literal["soft", "hard"],
    num_hints: int,
) -> None:
    model = tiny(augmentation={"path": path, "fusion": fusion}, loud=0.5)
    calls, states, steps, rows = watch(model), list[SamplerState](), 5, 4
    start = blank(rows, LENGTH)
    sample(model, start, with_hints(num_hints, z0), steps, on_step=states.append)
    first_KBLD = torch.stack([call.given["hint"] for call in calls[:num_hints]])
    plain = PlainSampler(model, path, fusion, z0, num_hints)
    for row in range(rows):
        noise_SKLD = [move["noise"][:, row] for move in moves]
        with torch.inference_mode():
            key = start.key.rows(row, row + 1)
            history = plain.run(key, steps, first_KBLD[:, row], noise_SKLD)
        for tokens, state in zip(history, states, strict=False):
            assert state.tokens_BL[row].tolist() == tokens
    assert len(moves) == steps - 1


def test_every_noise_is_fresh(tiny: Tiny, blank: Blank, watch: Watch, moves: list[dict[str, Tensor]]) -> None:
    """The pure noise a block begins with, and what each step and each of the hints adds, tell nothing of each other."""
    model = tiny(augmentation={}, block_size=3)
    calls = watch(model)
    sample(model, blank(400, LENGTH), with_hints(2, amount=Even()), 3)
    begun = [torch.stack([call.given["hint"] for call in calls[n : n + 2]])[:, :, -3:] for n in (0, 3 * 2 + 1)]
    noises = [begun[0], *(m["noise"] for m in moves[:2]), begun[1], *(m["noise"] for m in moves[2:])]
    flat_NE = torch.stack([hint.flatten() for noise in noises for hint in noise])
    assert flat_NE.shape == (12, 400 * 3 * WIDTH)
    limit = 5 / math.sqrt(flat_NE.shape[1])
    assert float((torch.corrcoef(flat_NE) - torch.eye(12)).abs().max()) < limit
    assert float(flat_NE.mean()) == pytest.approx(0, abs=limit)
    assert float(flat_NE.std()) == pytest.approx(1, abs=limit)


def test_hints_follow_the_marginal_where_the_estimate_is_right(
    tiny: Tiny, blank: Blank, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a known z0 the steps compose to z_s ~ N(a_s z0, b_s^2), whatever their number (CADD Eq. 11)."""
    model = tiny(augmentation={})
    z0_D = torch.linspace(-2, 2, WIDTH)
    monkeypatch.setattr(Augmentation, "estimate", lambda self, p_MV, *_: z0_D.expand(len(p_MV), -1))
    calls = watch(model)
    for steps in (2, 3, 7):
        calls.clear()
        sample(model, blank(3000, LENGTH), Policies(order="left_to_right", choice=TokenChoice()), steps)
        for number, call in enumerate(calls):
            t = 1 - number / steps
            hint_BD = call.given["hint"][:, -1]
            torch.testing.assert_close(hint_BD.mean(0), (1 - t) * z0_D, atol=5 * t / math.sqrt(3000), rtol=0)
            assert float((hint_BD - (1 - t) * z0_D).std()) == pytest.approx(t, rel=0.03)


@torch.inference_mode()
def test_predictions_are_averaged_as_probabilities(tiny: Tiny, blank: Blank, watch: Watch) -> None:
    """The best token under the mean of K predictions, which is not always the best under the mean of their logits."""
    model = tiny(augmentation={"fusion": "add"}, loud=0.6)
    calls = watch(model)
    final = sample(model, blank(300, LENGTH), with_hints(4, choice=TokenChoice(0.0)), 1)
    assert len(calls) == 4
    logits_KMV = torch.stack([model.logits(call.hidden.flatten(0, 1)) for call in calls])
    best_M = logits_KMV.double().softmax(2).mean(0).argmax(1)
    assert torch.equal(final.tokens_BL.flatten(), best_M)
    of_logits_M = logits_KMV.mean(0).argmax(1)
    assert 0 < float((best_M != of_logits_M).double().mean()) < 0.5


def test_the_average_is_a_distribution() -> None:
    log_probs = [(torch.randn(50, 7, generator=torch.Generator().manual_seed(n)) * 4).log_softmax(1) for n in range(3)]
    for number in (1, 2, 3):
        found = average(log_probs[:number]).double().exp()
        torch.testing.assert_close(found, torch.stack(log_probs[:number]).double().exp().mean(0), atol=1e-6, rtol=1e-5)
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert average([impossible, impossible]).tolist() == [[0.0, -math.inf]]


def test_hints_of_revealed_positions_say_nothing(tiny: Tiny, blank: Blank, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(augmentation={}, loud=0.5)
    start = blank(20, LENGTH, prompts=(0, 2))
    expected = sample(model, start, with_hints(2), 4).tokens_BL
    denoise = model.denoise
    changed: list[int] = []

    def garbled(x_t: Tensor, *, hint: Tensor, **given: Any) -> Tensor:
        known_BL1 = (x_t != MASK)[..., None]
        changed.append(int(known_BL1.sum()))
        return denoise(x_t, hint=torch.where(known_BL1, 1e6, hint), **given)

    monkeypatch.setattr(model, "denoise", garbled)
    assert torch.equal(sample(model, start, with_hints(2), 4).tokens_BL, expected)
    assert all(changed)


@pytest.mark.parametrize("num_hints", [1, 3])
@pytest.mark.parametrize("block_size", [0, 3])
def test_a_sample_does_not_depend_on_its_batch(tiny: Tiny, blank: Blank, num_hints: int, block_size: int) -> None:
    model = tiny(augmentation={}, block_size=block_size)
    chosen = with_hints(num_hints)
    whole = sample(model, blank(12, LENGTH), chosen, 4).tokens_BL
    parts = [sample(model, blank(n, LENGTH, first_index=f), chosen, 4).tokens_BL for f, n in ((0, 5), (5, 1), (6, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sample(model, blank(12, LENGTH, seed=1), chosen, 4).tokens_BL, whole)


def test_soft_and_hard_estimates_and_more_hints_are_other_samplers(tiny: Tiny, blank: Blank) -> None:
    model = tiny(augmentation={}, loud=0.5)
    choices = [with_hints(1, "soft"), with_hints(1, "hard"), with_hints(2, "soft")]
    found = [sample(model, blank(300, LENGTH), each, 4).tokens_BL for each in choices]
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)


def test_hints_that_are_none_are_refused(tiny: Tiny, blank: Blank) -> None:
    with pytest.raises(ValueError, match="num_hints=0 must be at least 1"):
        HintPolicy(0)
    with pytest.raises(ValueError, match="num_hints=2 needs a model with augmentation: use 1"):
        sample(tiny(), blank(1, LENGTH), with_hints(2), 2)
