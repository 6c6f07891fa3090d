"""Sampling against exact enumeration, and its policies against plain ones."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizers import Tokenizer, make_tokenizer
from eval.completion import complete
from eval.sampling.amount import Ancestral, Cosine, Even
from eval.sampling.choice import TokenChoice
from eval.sampling.hints import HintPolicy
from eval.sampling.loop import Policies, sample
from eval.sampling.order import OrderName, scores
from eval.sampling.settings import SamplingSettings
from eval.sampling.state import SamplerState
from model.config import AugmentationConfig, LatentConfig, ModelConfig, ScheduleConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from model.noise import NoiseKey

MASK, LENGTH = 4, 3
ORDERS: tuple[OrderName, ...] = ("random", "top_probability", "margin", "entropy", "left_to_right")


def make_model(vocab_size: int = 5, mask_id: int = MASK, *, scale: float = 1.0, **switches: Any) -> MaskedDiffusion:
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2)
    model = MaskedDiffusion(ModelConfig(backbone=backbone, vocab_size=vocab_size, mask_id=mask_id, **switches))
    initialise(model, 0, num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3 * scale)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MaskedDiffusion:
    """A random model of three tokens from four symbols."""
    return make_model()


def blank(rows: int, length: int = LENGTH, *, seed: int = 0, first_index: int = 0, mask_id: int = MASK) -> SamplerState:
    tokens_BL = torch.full((rows, length), mask_id)
    return SamplerState.start(
        tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool), mask_id=mask_id, seed=seed, first_index=first_index
    )


@torch.inference_mode()
def predictions(model: MaskedDiffusion, x: tuple[int, ...]) -> list[list[float]]:
    """Probabilities of each symbol at each position."""
    hidden_LD = model.denoise(torch.tensor([x]))[0]
    return model.logits(hidden_LD).double().softmax(1).tolist()


def exact_ancestral(model: MaskedDiffusion, steps: int, schedule: ScheduleConfig) -> dict[tuple[int, ...], float]:
    """The distribution of the ancestral sampler, over every path."""
    alphas = {"linear": lambda t: 1 - t, "polynomial": lambda t: 1 - t**2}
    alpha = alphas[schedule.kind]
    now: dict[tuple[int, ...], float] = {(MASK,) * LENGTH: 1.0}
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        flip = (alpha(s) - alpha(t)) / (1 - alpha(t))
        later: dict[tuple[int, ...], float] = defaultdict(float)
        for x, probability in now.items():
            predicted = predictions(model, x)
            options = [
                [(MASK, 1 - flip), *((v, flip * predicted[i][v]) for v in range(4))]
                if token == MASK
                else [(token, 1.0)]
                for i, token in enumerate(x)
            ]
            for chosen in itertools.product(*options):
                later[tuple(v for v, _ in chosen)] += probability * math.prod(p for _, p in chosen)
        now = {x: p for x, p in later.items() if p > 0}
    return now


@pytest.mark.parametrize(("steps", "kind"), [(1, "linear"), (2, "linear"), (3, "linear"), (3, "polynomial")])
def test_ancestral_samples_follow_the_exact_distribution(model: MaskedDiffusion, steps: int, kind: str) -> None:
    schedule = ScheduleConfig(kind=kind)  # type: ignore[arg-type]
    expected = exact_ancestral(model, steps, schedule)
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) == 64
    number = 40_000
    final = sample(model, blank(number), Policies(Ancestral(schedule), "random", TokenChoice()), steps)
    counts = Counter(map(tuple, final.tokens_BL.tolist()))
    chi_square = sum((counts[x] - number * p) ** 2 / (number * p) for x, p in expected.items())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    if steps > 1:
        other = exact_ancestral(model, 1, schedule)
        assert sum((counts[x] - number * p) ** 2 / (number * p) for x, p in other.items()) > chi_square


def test_one_at_a_time_follows_the_exact_distribution_of_random_orders(model: MaskedDiffusion) -> None:
    expected: dict[tuple[int, ...], float] = defaultdict(float)
    for order in itertools.permutations(range(LENGTH)):
        for x in itertools.product(range(4), repeat=LENGTH):
            seen, probability = [MASK] * LENGTH, 1 / 6
            for position in order:
                probability *= predictions(model, tuple(seen))[position][x[position]]
                seen[position] = x[position]
            expected[x] += probability
    number = 40_000
    final = sample(model, blank(number, seed=1), Policies(Even(), "random", TokenChoice()), LENGTH)
    counts = Counter(map(tuple, final.tokens_BL.tolist()))
    chi_square = sum((counts[x] - number * p) ** 2 / (number * p) for x, p in expected.items())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(model: MaskedDiffusion, temperature: float) -> None:
    number = 20_000
    (first, *_) = predictions(model, (MASK,) * LENGTH)
    weights = [p ** (1 / temperature) for p in first[:4]]
    final = sample(model, blank(number), Policies(Even(), "random", TokenChoice(temperature)), 1)
    counts = final.tokens_BL[:, 0].bincount(minlength=4).tolist()
    for count, weight in zip(counts, weights, strict=True):
        p = weight / sum(weights)
        assert abs(count - number * p) < 5 * math.sqrt(number * p * (1 - p))


def policies() -> Iterator[Policies]:
    for order in ORDERS:
        yield Policies(Even(), order, TokenChoice(1.0, 0.8))
        yield Policies(Ancestral(ScheduleConfig()), order, TokenChoice(0.7))
        yield Policies(Cosine(), order, TokenChoice(0.7))


def test_a_sample_does_not_depend_on_its_batch(model: MaskedDiffusion) -> None:
    for policy in policies():
        whole = sample(model, blank(12, 8), policy, 5).tokens_BL
        parts = [sample(model, blank(n, 8, first_index=f), policy, 5).tokens_BL for f, n in ((0, 5), (5, 1), (6, 6))]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(sample(model, blank(12, 8), policy, 5).tokens_BL, whole)
        assert not torch.equal(sample(model, blank(12, 8, seed=1), policy, 5).tokens_BL, whole)


def test_prompts_stay_everything_is_revealed_and_the_mask_is_never_drawn(model: MaskedDiffusion) -> None:
    generator = torch.Generator().manual_seed(0)
    for policy in policies():
        tokens_BL = torch.randint(4, (20, 9), generator=generator)
        masked_BL = torch.rand(20, 9, generator=generator) < 0.6
        masked_BL[0], masked_BL[1] = True, False
        for steps in (1, 4, 30):
            start = SamplerState.start(tokens_BL, masked_BL, mask_id=MASK, seed=0)
            states: list[SamplerState] = []
            final = sample(model, start, policy, steps, on_step=states.append)
            assert torch.equal(final.tokens_BL[~masked_BL], tokens_BL[~masked_BL])
            assert not final.masked_BL.any()
            assert (final.tokens_BL != MASK).all()
            assert len(states) <= steps
            for before, after in itertools.pairwise([start, *states]):
                known_BL = ~before.masked_BL
                assert torch.equal(after.tokens_BL[known_BL], before.tokens_BL[known_BL])
                assert not (after.masked_BL & known_BL).any()
                assert torch.equal(after.tokens_BL == MASK, after.masked_BL)


def test_even_reveals_the_same_number_every_step(model: MaskedDiffusion) -> None:
    masked_BL = torch.arange(10)[None] < torch.tensor([10, 7, 3, 0])[:, None]
    start = SamplerState.start(torch.zeros(4, 10, dtype=torch.int64), masked_BL, mask_id=MASK, seed=0)
    counts = [masked_BL.sum(1)]
    sample(model, start, Policies(), 4, on_step=lambda state: counts.append(state.masked_BL.sum(1)))
    revealed_SB = -torch.stack(counts).diff(dim=0)
    assert revealed_SB[:, 0].tolist() == [3, 3, 2, 2]
    assert revealed_SB.sum(0).tolist() == [10, 7, 3, 0]
    assert int((revealed_SB.max(0).values - revealed_SB.min(0).values).max()) <= 1


def test_cosine_reveals_few_while_little_is_known(model: MaskedDiffusion) -> None:
    hidden_B = torch.tensor([100, 14, 3, 1, 0])
    masked_BL = torch.arange(100)[None] < hidden_B[:, None]
    start = SamplerState.start(torch.zeros(5, 100, dtype=torch.int64), masked_BL, mask_id=MASK, seed=0)
    left = [hidden_B]
    sample(model, start, Policies(Cosine()), 5, on_step=lambda state: left.append(state.masked_BL.sum(1)))
    left_SB = torch.stack(left)
    assert left_SB[-1].tolist() == [0] * 5
    for step in range(6):
        wanted = 100 * math.cos(math.pi / 2 * step / 5)
        assert wanted - 3 < int(left_SB[step, 0]) <= wanted + 1e-9
    revealed_SB = -left_SB.diff(dim=0)
    assert (revealed_SB[:-1, :2].diff(dim=0) >= 0).all()
    assert ((revealed_SB > 0) | (left_SB[:-1] == 0)).all()


def test_ancestral_amounts_have_the_right_mean() -> None:
    schedule = ScheduleConfig(kind="cosine")
    masked_BL = torch.ones(4000, 20, dtype=torch.bool)
    for step in range(4):
        key = NoiseKey(0, step, torch.arange(4000))
        t, s = 1 - step / 4, 1 - (step + 1) / 4
        flip = 1 - (math.cos(math.pi / 2 * (1 - s)) / math.cos(math.pi / 2 * (1 - t)))
        count_B = Ancestral(schedule)(masked_BL, step, 4, key).double()
        error = math.sqrt(20 * flip * (1 - flip) / 4000)
        assert float(count_B.mean()) == pytest.approx(20 * flip, abs=5 * error + 1e-9)


@pytest.mark.parametrize("order", ["top_probability", "margin", "entropy"])
def test_temperature_zero_is_the_greedy_decoder(model: MaskedDiffusion, order: OrderName) -> None:
    x = [MASK] * 6
    for _ in range(6):
        masked = [i for i in range(6) if x[i] == MASK]
        predicted = predictions(model, tuple(x))
        confidence = {i: plain_score(order, predicted[i]) for i in masked}
        best = max(masked, key=lambda i: confidence[i])
        x[best] = max(range(5), key=lambda v: predicted[best][v])
    final = sample(model, blank(2, 6), Policies(Even(), order, TokenChoice(0.0)), 6)
    assert final.tokens_BL.tolist() == [x, x]


def plain_score(order: str, probabilities: list[float]) -> float:
    best, second = sorted(probabilities, reverse=True)[:2]
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return {"top_probability": best, "margin": best - second, "entropy": -entropy}[order]


@pytest.mark.parametrize("order", ORDERS)
def test_orders_against_plain_formulas(order: OrderName) -> None:
    log_probs_MV = (torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) * 3).log_softmax(1)
    log_probs_MV[:, 6] = -torch.inf
    log_probs_MV = log_probs_MV.log_softmax(1)
    chosen_M, random_M, rows_M = log_probs_MV.argmax(1), torch.rand(30), torch.arange(30) * 3
    found = scores(order, log_probs_MV, chosen_M, random_M, rows_M)
    if order == "random":
        assert torch.equal(found, random_M)
        return
    if order == "left_to_right":
        assert found.argsort(descending=True).tolist() == list(range(30))
        return
    plain = [plain_score(order, row) for row in log_probs_MV.exp().double().tolist()]
    best = found.argsort().tolist()
    assert best == sorted(range(30), key=lambda row: plain[row])


def plain_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    kept: set[int] = set()
    for token in sorted(range(len(probabilities)), key=lambda v: -probabilities[v]):
        if sum(probabilities[v] for v in kept) >= top_p:
            break
        kept.add(token)
    return kept


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_top_p_draws_from_the_nucleus_in_proportion(top_p: float, temperature: float) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3)).double() * 2
    draws = 20_000
    probability = (logits_V / temperature).softmax(0).tolist()
    kept = plain_nucleus(probability, top_p)
    stream = NoiseKey(0, 0, torch.arange(draws)).stream("token")
    drawn = TokenChoice(temperature, top_p)(logits_V.log_softmax(0).float().expand(draws, 12), stream)
    counts = drawn.bincount(minlength=12).tolist()
    total = sum(probability[v] for v in kept)
    for token in range(12):
        p = probability[token] / total if token in kept else 0.0
        assert abs(counts[token] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1e-9


def test_chunks_bound_the_logits_and_change_no_sample(model: MaskedDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [sample(model, blank(12, 8), policy, 5).tokens_BL for policy in policies()]
    sizes: list[int] = []
    logits = MaskedDiffusion.logits

    def counting(model: MaskedDiffusion, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        sizes.append(len(hidden_MD))
        return logits(model, hidden_MD, rows_M)

    monkeypatch.setattr(MaskedDiffusion, "logits", counting)
    monkeypatch.setattr("eval.sampling.loop.CHUNK_ELEMENTS", 35)
    for policy, expected in zip(policies(), whole, strict=True):
        assert torch.equal(sample(model, blank(12, 8), policy, 5).tokens_BL, expected)
    assert max(sizes) == 7
    monkeypatch.setattr("eval.sampling.loop.CHUNK_ELEMENTS", 1)
    sizes.clear()
    sample(model, blank(2, 4), Policies(), 1)
    assert sizes == [1] * 8


AR = ModelConfig(autoregressive=True)


@pytest.mark.parametrize(
    ("settings", "model", "steps", "order"),
    [
        (SamplingSettings(), ModelConfig(), 64, "top_probability"),
        (SamplingSettings(amount="ancestral"), ModelConfig(), 64, "random"),
        (SamplingSettings(amount="ancestral", order="margin"), ModelConfig(), 64, "margin"),
        (SamplingSettings(order="random", steps=7), ModelConfig(), 7, "random"),
        (SamplingSettings(), AR, None, "left_to_right"),
        (SamplingSettings(order="margin", steps=7), AR, 7, "margin"),
    ],
)
def test_what_is_left_open_follows_amount_and_model(
    settings: SamplingSettings, model: ModelConfig, steps: int | None, order: str
) -> None:
    decided = asdict(settings.for_model(model))
    assert (decided.pop("steps"), decided.pop("order")) == (steps, order)
    assert decided.items() <= asdict(settings).items()
    assert settings.policies(model).order == order


def test_settings_become_policies() -> None:
    settings = SamplingSettings(latent="refreshed", hints=3, hint_estimate="soft", temperature=0.5, top_p=0.9)
    made = settings.policies(ModelConfig(), stop_id=7)
    assert (made.latent, made.hints, made.stop_id) == ("refreshed", HintPolicy(3, "soft"), 7)
    assert made.choice == TokenChoice(0.5, 0.9)
    with pytest.raises(ValueError, match="num_hints=0 must be at least 1"):
        SamplingSettings(hints=0).policies(ModelConfig())


class Counts(MaskedDiffusion):
    """Writes how many positions are hidden, modulo 4; the surer, the later the position."""

    def denoise(self, x_t: Tensor, **options: object) -> Tensor:
        hidden_B11 = (x_t == MASK).sum(1)[:, None, None]
        return torch.cat([hidden_B11.expand(*x_t.shape, 1), torch.arange(x_t.shape[1]).expand(x_t.shape)[..., None]], 2)

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        symbols_MV = torch.nn.functional.one_hot(hidden_MD[:, 0] % 4, self.config.vocab_size)
        return symbols_MV * (1.0 + hidden_MD[:, 1:])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("amount", ["even", "ancestral"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_it_is_known_when_every_sample_is_the_same(
    order: OrderName, amount: Literal["even", "ancestral"], steps: int, temperature: float
) -> None:
    settings = SamplingSettings(order=order, amount=amount, steps=steps, temperature=temperature)
    model = Counts(make_model().config)
    final = sample(model, blank(300, 6), settings.policies(model.config), steps)
    assert settings.always_the_same == (len(set(map(tuple, final.tokens_BL.tolist()))) == 1)


@pytest.mark.parametrize(
    ("settings", "name"), [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p")]
)
def test_choices_out_of_range_are_refused(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must"):
        TokenChoice(**settings)


def test_no_steps_are_refused(model: MaskedDiffusion) -> None:
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        sample(model, blank(1), Policies(), 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer("bytes", lambda: iter(()))


@pytest.fixture(scope="module")
def writer(tokenizer: Tokenizer) -> MaskedDiffusion:
    return make_model(tokenizer.vocab_size, tokenizer.mask_id)


class Ends(MaskedDiffusion):
    """Writes `a` at even positions, `b` at odd ones, and the end token at position 7."""

    tokenizer: Tokenizer

    def denoise(self, x_t: Tensor, **options: object) -> Tensor:
        return torch.arange(x_t.shape[1]).expand(x_t.shape)[..., None].float()

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        wanted = [self.tokenizer.end_id if p == 7 else ord("ab"[p % 2]) for p in hidden_MD[:, 0].int().tolist()]
        ids = [w if w == self.tokenizer.end_id else self.tokenizer.encode(chr(w))[0] for w in wanted]
        return torch.nn.functional.one_hot(torch.tensor(ids), self.config.vocab_size).float() * 50


def test_a_completion_stops_at_the_end_token(tokenizer: Tokenizer) -> None:
    model = Ends(make_model(tokenizer.vocab_size, tokenizer.mask_id).config)
    model.tokenizer = tokenizer
    done = complete(model, tokenizer, ["xy", "", "xxxxxxxx"], SamplingSettings(steps=3), length=12, record_frames=True)
    assert [c.text for c in done] == ["ababa", "abababa", "abab"]
    assert [c.prompt for c in done] == ["xy", "", "xxxxxxxx"]
    frames = done[0].frames
    assert len(frames) == 4
    assert [kind for _, kind in frames[0]] == ["prompt"] * 2 + ["masked"] * 10
    assert "masked" not in {kind for _, kind in frames[-1]}
    for before, after in itertools.pairwise(frames):
        for (text, kind), (later, later_kind) in zip(before, after, strict=True):
            assert later_kind == {"prompt": "prompt", "new": "known", "known": "known"}.get(kind, later_kind)
            assert kind == "masked" or later == text


SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"block_size": 4},
    "autoregressive": {"autoregressive": True},
    "latent": {"block_size": 4, "latent": LatentConfig(dim=2, inject="embedding")},
    "hints": {"block_size": 4, "augmentation": AugmentationConfig()},
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("amount", ["even", "ancestral"])
def test_completions_do_not_depend_on_the_batch_size(
    tokenizer: Tokenizer, name: str, amount: Literal["even", "ancestral"]
) -> None:
    """Nor do their frames, though rows end in different blocks and need different numbers of steps."""
    if name == "autoregressive":
        amount = "even"
    model = make_model(tokenizer.vocab_size, tokenizer.mask_id, **SWITCHES[name])
    prompts = ["def f", "x = 1\n", "", "for", "if x:", "class A", "y", "z = 2"] * 2
    settings = SamplingSettings(
        steps=20 if name == "autoregressive" else 3,
        temperature=20.0,
        amount=amount,
        hints=1 + (name == "hints"),
        latent="refreshed" if name == "latent" else "kept",
        seed=2,
    )
    one, many = (
        complete(model, tokenizer, prompts, settings, length=20, batch_size=size, record_frames=True) for size in (1, 5)
    )
    assert one == many
    other = replace(settings, seed=3)
    again = complete(model, tokenizer, prompts, other, length=20)
    assert [c.text for c in again] != [c.text for c in one]
    assert [c.prompt for c in one] == prompts
    assert complete(model, tokenizer, [], settings, length=20) == []
    for completion in one:
        first, *_, last = completion.frames
        assert [kind for _, kind in first[len(completion.prompt) :]] == ["masked"] * (20 - len(completion.prompt))
        assert "masked" not in {kind for _, kind in last}
        assert "new" in {kind for _, kind in last}


def test_a_canvas_is_rounded_up_to_whole_blocks(tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer.vocab_size, tokenizer.mask_id, block_size=8)
    (done,) = complete(model, tokenizer, ["ab"], SamplingSettings(steps=2), length=17, record_frames=True)
    assert len(done.frames[0]) == 24


def test_an_autoregressive_model_writes_with_the_default_settings(tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer.vocab_size, tokenizer.mask_id, autoregressive=True)
    (done,) = complete(model, tokenizer, ["def"], SamplingSettings(), length=80, record_frames=True)
    tokens = tokenizer.encode("def")
    with torch.inference_mode():
        while len(tokens) < 80:
            hidden = model.denoise(torch.tensor([[*tokens, tokenizer.mask_id]]))[0, -1:]
            tokens.append(int(model.logits(hidden).argmax()))
    ended = tokens.index(tokenizer.end_id) if tokenizer.end_id in tokens else 80
    assert done.text == tokenizer.decode(tokens[3:ended])
    assert len(done.frames) == 78


@pytest.mark.parametrize("length", [3, 6])
def test_a_prompt_without_room_is_refused(writer: MaskedDiffusion, tokenizer: Tokenizer, length: int) -> None:
    with pytest.raises(
        ValueError, match=f"a prompt of 6 tokens leaves no room on a canvas of {length}: raise --length"
    ):
        complete(writer, tokenizer, ["ab", "abcdef"], SamplingSettings(), length=length)
