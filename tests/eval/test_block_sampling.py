"""Blocks in the sampler: what the cache changes (nothing), where a sequence ends, and one token at a time."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eval.sampling.amount import Amount, Ancestral, Even
from eval.sampling.choice import TokenChoice
from eval.sampling.hints import HintPolicy
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.batch import Batch
from model.config import ScheduleConfig
from model.corruption import corrupt
from model.diffusion import MaskedDiffusion
from model.masks import MaskSpec
from model.noise import NoiseKey

MASK, LENGTH, BLOCK = 4, 12, 3
Tiny = Callable[..., MaskedDiffusion]
Blank = Callable[..., SamplerState]
Watch = Callable[[MaskedDiffusion], list[Any]]
Misfit = Callable[..., float]

ADALN, EMBEDDED = {"dim": 3, "inject": "adaln"}, {"dim": 3, "inject": "embedding"}
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "positions": {"backbone": {"max_positions": LENGTH}},
    "time": {"time_conditioning": True},
    "latent": {"latent": ADALN},
    "embedded": {"latent": EMBEDDED},
    "prior_x_t": {"latent": {**ADALN, "prior": "x_t"}, "time_conditioning": True},
    "prior_earlier": {"latent": {**EMBEDDED, "prior": "earlier_blocks"}},
    "hints": {"augmentation": {}},
    "reweight": {"augmentation": {"fusion": "reweight", "path": "vp"}, "time_conditioning": True},
    "concat": {"augmentation": {"fusion": "concat"}},
    "literal": {"augmentation": {"fusion": "literal"}},
    "all": {"latent": {**ADALN, "prior": "earlier_blocks"}, "augmentation": {}, "time_conditioning": True},
}
CASES = [
    (name, latent)
    for name, switches in SWITCHES.items()
    for latent in ("kept", "redrawn", "refreshed")
    if latent == "kept" or "latent" in switches
]


def policies_of(model: MaskedDiffusion, **changes: Any) -> Policies:
    """Everything random that a model has: a new z every step, two hints, tokens and places drawn."""
    settings = {
        "amount": Ancestral(ScheduleConfig()),
        "order": "random",
        "choice": TokenChoice(),
        "latent": "kept" if model.latent is None else "redrawn",
        "hints": HintPolicy(1 if model.augmentation is None else 2),
    }
    return Policies(**{**settings, **changes})


@pytest.fixture(scope="module")
def models(tiny: Tiny) -> dict[str, MaskedDiffusion]:
    return {name: tiny(block_size=BLOCK, loud=0.2, **switches) for name, switches in SWITCHES.items()}


@pytest.mark.parametrize(("name", "latent"), CASES)
def test_the_cache_changes_neither_logits_nor_tokens(
    models: dict[str, MaskedDiffusion], blank: Blank, name: str, latent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[name]
    logits, seen = model.logits, list[torch.Tensor]()

    def recording(hidden_MD: torch.Tensor, rows_M: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(logits(hidden_MD, rows_M))
        return seen[-1]

    monkeypatch.setattr(model, "logits", recording)
    start = blank(6, LENGTH, prompts=(0, 2, 5, 7))
    final, given = {}, {}
    for cache in (True, False):
        seen.clear()
        final[cache] = sample(model, start, policies_of(model, latent=latent, cache=cache), 3).tokens_BL
        given[cache] = list(seen)
    assert torch.equal(final[True], final[False])
    assert len(given[True]) == len(given[False]) > 3
    for with_cache, without in zip(given[True], given[False], strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_cached_block_is_all_that_the_network_reads(
    models: dict[str, MaskedDiffusion], blank: Blank, watch: Watch, name: str
) -> None:
    model = models[name]
    calls = watch(model)
    sample(model, blank(2, LENGTH), policies_of(model), 3)
    assert {call.x_t.shape for call in calls} == {(2, BLOCK)}
    calls.clear()
    sample(model, blank(2, LENGTH), policies_of(model, cache=False), 3)
    assert {call.x_t.shape for call in calls} == {(2, stop) for stop in (3, 6, 9, 12)}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_sampler_sees_what_training_showed(
    models: dict[str, MaskedDiffusion], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each block as the sampler meets it, behind clean blocks, against the two streams of one training pass."""
    model = models[name]
    index_B = torch.arange(3)
    tokens_BL = torch.randint(MASK, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones(3, LENGTH, dtype=torch.bool),
        positions_BL=torch.arange(LENGTH).expand(3, LENGTH),
        index_B=index_B,
    )
    corruption = corrupt(batch, NoiseKey(0, 0, index_B), model.config)
    z_BSd = None if model.latent is None else torch.randn(3, LENGTH // BLOCK, 3)
    added, hint_BLD = None, None
    if model.augmentation is not None:
        hint_BLD = torch.randn(3, LENGTH, 16)
        real = corruption.rows_M[: corruption.num_masked]
        with monkeypatch.context() as patch:
            patch.setattr(model.augmentation, "noisy", lambda *_: hint_BLD.flatten(0, 1)[real])
            added = model.draw_hint(corruption)
    trained = model.hidden(batch, corruption, hint=added, latent=z_BSd)
    for block in range(LENGTH // BLOCK):
        stop = (block + 1) * BLOCK
        own = slice(stop - BLOCK, stop)
        x_BL = torch.cat((tokens_BL[:, : own.start], corruption.x_t_BL[:, own]), dim=1)
        t_BS = torch.cat((torch.zeros(3, block), corruption.t_BS[:, block : block + 1]), dim=1)
        met = model.denoise(
            x_BL,
            t=t_BS,
            hint=None if hint_BLD is None else hint_BLD[:, :stop],
            latent=None if z_BSd is None else z_BSd[:, : block + 1],
        )
        torch.testing.assert_close(met[:, own], trained[:, own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "latent"), CASES)
@pytest.mark.parametrize(("amount", "stop_id"), [(Even(), None), (Ancestral(ScheduleConfig()), 1)])
def test_a_sample_is_the_same_alone_and_in_a_batch(
    models: dict[str, MaskedDiffusion], blank: Blank, name: str, latent: str, amount: Amount, stop_id: int | None
) -> None:
    """Rows with prompts of different lengths need different numbers of steps, and end in different blocks."""
    model = models[name]
    chosen = policies_of(model, latent=latent, amount=amount, stop_id=stop_id)
    prompts = (0, 2, 4, 11, 6)
    whole = sample(model, blank(5, LENGTH, prompts=prompts), chosen, 3).tokens_BL
    for number in range(5):
        start = blank(1, LENGTH, prompts=prompts, first_index=number)
        assert torch.equal(sample(model, start, chosen, 3).tokens_BL[0], whole[number])


def test_a_sequence_ends_with_the_block_its_end_token_is_in(tiny: Tiny, blank: Blank, watch: Watch) -> None:
    model, stop_id = tiny(block_size=BLOCK), 2
    start = blank(24, LENGTH, prompts=(0, 4))
    everything = sample(model, start, policies_of(model), 3).tokens_BL
    calls = watch(model)
    found = sample(model, start, policies_of(model, stop_id=stop_id), 3)
    rows_read = sum(len(call.x_t) for call in calls)
    lengths = set()
    for row in range(24):
        first = 0 if row % 2 == 0 else 4
        written = everything[row].tolist()
        ends = [n for n in range(first, LENGTH) if written[n] == stop_id]
        whole = LENGTH if not ends else (ends[0] // BLOCK + 1) * BLOCK
        lengths.add(whole)
        assert found.tokens_BL[row].tolist() == written[:whole] + [stop_id] * (LENGTH - whole)
    assert len(lengths) == 4
    assert not found.masked_BL.any()
    calls.clear()
    sample(model, start, policies_of(model), 3)
    assert rows_read < 0.8 * sum(len(call.x_t) for call in calls)


def test_the_end_token_of_a_prompt_ends_nothing(tiny: Tiny) -> None:
    model = tiny(block_size=BLOCK)
    tokens_BL = torch.full((1, 6), 2)
    masked_BL = torch.arange(6)[None] >= 2
    start = SamplerState.start(tokens_BL, masked_BL, mask_id=MASK, seed=0)
    assert not sample(model, start, policies_of(model, stop_id=2), 3).masked_BL.any()
    for seed in range(20):
        start = SamplerState.start(tokens_BL, torch.arange(6)[None] >= 3, mask_id=MASK, seed=seed)
        plain = sample(model, start, policies_of(model), 3).tokens_BL
        assert torch.equal(sample(model, start, policies_of(model, stop_id=2), 3).tokens_BL, plain)


def test_steps_are_counted_in_each_block(tiny: Tiny, blank: Blank) -> None:
    model = tiny(block_size=BLOCK)
    for steps, expected in ((1, [3]), (2, [2, 1]), (3, [1, 1, 1]), (8, [1, 1, 1])):
        states = [blank(1, LENGTH)]
        sample(model, states[0], Policies(), steps, on_step=states.append)
        revealed = [int((a.masked_BL & ~b.masked_BL).sum()) for a, b in itertools.pairwise(states)]
        assert revealed == expected * 4
        for number, state in enumerate(states[:: len(expected)]):
            assert state.masked_BL[0].tolist() == [False] * (number * BLOCK) + [True] * (LENGTH - number * BLOCK)


@torch.inference_mode()
def left_to_right(next_token: Callable[[tuple[int, ...]], list[float]], length: int) -> dict[tuple[int, ...], float]:
    """The distribution of sequences that are written one token after the other."""
    return {
        x: math.prod(next_token(x[:n])[x[n]] for n in range(length)) for x in itertools.product(range(4), repeat=length)
    }


def test_blocks_of_one_write_left_to_right(tiny: Tiny, blank: Blank, misfit: Misfit) -> None:
    model = tiny(block_size=1)

    def next_token(earlier: tuple[int, ...]) -> list[float]:
        hidden = model.denoise(torch.tensor([[*earlier, MASK]]))[0, -1:]
        probabilities: list[float] = model.logits(hidden).double().softmax(1)[0].tolist()
        return probabilities

    expected = left_to_right(next_token, 3)
    final = sample(model, blank(40_000, 3), Policies(Even(), "top_probability", TokenChoice()), 1)
    assert misfit(final.tokens_BL, expected) < 5
    backwards = {x[::-1]: p for x, p in expected.items()}
    assert misfit(final.tokens_BL, backwards) > 50


def test_an_autoregressive_model_samples_its_own_distribution(tiny: Tiny, blank: Blank, misfit: Misfit) -> None:
    model = tiny(autoregressive=True)

    def next_token(earlier: tuple[int, ...]) -> list[float]:
        """From the network itself, which reads a start token (the mask's) and what was written."""
        hidden = model.denoiser(torch.tensor([[MASK, *earlier]]), mask=MaskSpec(direction="causal"))[0, -1:]
        probabilities: list[float] = model.denoiser.logits(hidden)[0, :MASK].double().softmax(0).tolist()
        return probabilities

    expected = left_to_right(next_token, 3)
    for steps in (3, 5):
        final = sample(model, blank(40_000, 3), Policies(Even(), "left_to_right", TokenChoice()), steps)
        assert misfit(final.tokens_BL, expected) < 5
    assert misfit(final.tokens_BL, {x[::-1]: p for x, p in expected.items()}) > 50


def test_an_autoregressive_sample_does_not_depend_on_batch_or_steps(tiny: Tiny, blank: Blank) -> None:
    model, chosen = tiny(autoregressive=True), Policies(Even(), "left_to_right", TokenChoice())
    prompts = (0, 3, 1, 5)
    whole = sample(model, blank(8, 6, prompts=prompts), chosen, 6).tokens_BL
    for number in range(8):
        start = blank(1, 6, prompts=prompts, first_index=number)
        for steps in (6, 9):
            assert torch.equal(sample(model, start, chosen, steps).tokens_BL, whole[number : number + 1])


def test_a_canvas_without_whole_blocks_is_refused(tiny: Tiny, blank: Blank) -> None:
    with pytest.raises(ValueError, match=r"a canvas of 7 is not a whole number of blocks of 3: use a length of 9"):
        sample(tiny(block_size=BLOCK), blank(1, 7), Policies(), 3)


@pytest.mark.parametrize(
    ("policies", "steps"),
    [
        (Policies(order="top_probability"), 6),
        (Policies(order="left_to_right"), 5),
        (Policies(Ancestral(ScheduleConfig()), "left_to_right"), 6),
    ],
)
def test_an_autoregressive_model_refuses_what_it_can_not_do(
    tiny: Tiny, blank: Blank, policies: Policies, steps: int
) -> None:
    with pytest.raises(ValueError, match=r"an autoregressive model writes one token a step from left to right"):
        sample(tiny(autoregressive=True), blank(2, 6, prompts=(0, 2)), policies, steps)
