"""Tables of CADD: what is measured agrees with slower ways to the same numbers, and a whole table comes out of runs.

Shapes: N rows, B of a batch, L positions, D width, V vocabulary.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from data_pipeline.packing import ShardSource
from eval.likelihood import bound
from eval.sampling.amount import Ancestral
from eval.sampling.hints import HintPolicy
from eval.sampling.loop import Policies
from model.config import AugmentationConfig, ModelConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import MaskedDiffusion
from model.initialisation import initialise
from model.noise import NoiseKey
from pretrain.recipes import build
from pretrain.train import train
from tools.reproduce import cadd_ablations, cadd_noise
from tools.reproduce.cadd_ablations import ABLATIONS, RUNS, Written, unigram_entropy
from tools.reproduce.cadd_noise import NOISE_LEVELS, Gaps, fill, hide_one_each, nearest_row
from tools.reproduce.samples import draw
from tools.reproduce.training import Runs

Array = npt.NDArray[np.int64]

BYTES, MASK, END = 259, 256, 258
LENGTH = 24


def byte_model(**settings: object) -> MaskedDiffusion:
    """Loud random weights, so that whatever can be seen is seen."""
    backbone = TransformerConfig(dim=32, num_layers=2, num_heads=2)
    model = MaskedDiffusion(ModelConfig(backbone=backbone, vocab_size=BYTES, mask_id=MASK, **settings))  # type: ignore[arg-type]
    initialise(model, 0, num_layers=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def source(shards: Path) -> ShardSource:
    """Held-out rows, most of which hold the end of a document."""
    return ShardSource(shards, "validation", LENGTH)


@pytest.fixture(scope="module")
def cadd() -> MaskedDiffusion:
    """A model with hints."""
    return byte_model(augmentation=AugmentationConfig(), loss_weight="uniform")


@pytest.fixture(scope="module")
def gaps(source: ShardSource) -> Gaps:
    """A gap in each of some rows."""
    return hide_one_each(source, 60, 32, seed=3)


def test_gaps_are_one_in_each_row_anywhere_and_the_same_again(source: ShardSource, gaps: Gaps) -> None:
    assert len(gaps.place_N) == 60
    assert set(gaps.place_N.tolist()) <= set(range(LENGTH))
    assert len(set(gaps.place_N.tolist())) > LENGTH // 2
    assert gaps.targets_N.tolist() == [int(gaps.batch.tokens_BL[n, place]) for n, place in enumerate(gaps.place_N)]
    assert torch.equal(hide_one_each(source, 20, 32, seed=3).place_N, gaps.place_N[:20])
    assert not torch.equal(hide_one_each(source, 60, 32, seed=4).place_N, gaps.place_N)


def as_in_training(model: MaskedDiffusion, gaps: Gaps, t: float) -> Tensor:
    """What the training pass reads at the gaps, each row's hint added to the mask's embedding there."""
    rows = torch.arange(len(gaps.place_N))
    corruption = corrupt(gaps.batch, NoiseKey(0, 0, gaps.batch.index_B), model.config)
    masked_NL = torch.zeros_like(gaps.batch.maskable_BL)
    masked_NL[rows, gaps.place_N] = True
    x_t_NL = torch.where(masked_NL, MASK, gaps.batch.tokens_BL)
    hint_NLD = None
    if model.augmentation is not None:
        assert model.augmentation.scale is not None
        table_VD = model.denoiser.embed.weight
        z0_ND = table_VD[gaps.targets_N]
        z0_ND = z0_ND / z0_ND.square().mean(1, keepdim=True).sqrt() * model.augmentation.scale
        hint_NLD = torch.zeros(*x_t_NL.shape, 32)
        hint_NLD[rows, gaps.place_N] = ((1 - t) * z0_ND + t * gaps.noise_ND) * table_VD.square().mean().sqrt()
    corruption = replace(corruption, x_t_BL=x_t_NL, masked_BL=masked_NL)
    with torch.no_grad():
        hidden_NLD = model.hidden(gaps.batch, corruption, hint=hint_NLD)
        return model.logits(hidden_NLD[rows, gaps.place_N]).argmax(1)


@pytest.mark.parametrize("t", [0.1, 0.6, 1.0])
def test_gaps_are_filled_as_in_training(cadd: MaskedDiffusion, gaps: Gaps, t: float) -> None:
    for model in (cadd, byte_model()):
        filled_N = fill(model, gaps, t)
        assert torch.equal(filled_N, as_in_training(model, gaps, t))
        assert len(set(filled_N.tolist())) > 5


def test_what_is_hidden_is_known_from_its_hint_alone(cadd: MaskedDiffusion, gaps: Gaps) -> None:
    rows = torch.arange(len(gaps.place_N))
    other_NL = gaps.batch.tokens_BL.index_put((rows, gaps.place_N), (gaps.targets_N + 1) % 256)
    other = replace(gaps, batch=replace(gaps.batch, tokens_BL=other_NL))
    mdlm = byte_model()
    assert torch.equal(fill(mdlm, gaps, 0.5), fill(mdlm, other, 0.5))
    assert torch.equal(fill(cadd, gaps, 1.0), fill(cadd, other, 1.0))
    assert not torch.equal(fill(cadd, gaps, 0.1), fill(cadd, other, 0.1))


@pytest.mark.parametrize("unit", [False, True])
def test_the_nearest_row_is_the_most_probable_token_given_its_hint(
    cadd: MaskedDiffusion, gaps: Gaps, unit: bool
) -> None:
    assert cadd.augmentation is not None
    table_VD = cadd.denoiser.embed.weight.detach()
    rms = 1.0 if unit else cadd.augmentation.scale
    z0_VD = table_VD / table_VD.square().mean(1, keepdim=True).sqrt() * rms
    for t in (0.3, 0.5, 0.7):
        z_t_ND = (1 - t) * z0_VD[gaps.targets_N] + t * gaps.noise_ND
        error_NV = (z_t_ND[:, None] - (1 - t) * z0_VD).square().sum(2)
        error_NV[:, MASK] = math.inf
        assert torch.equal(nearest_row(cadd, gaps, t, unit=unit), error_NV.argmin(1))


def test_a_hint_at_unit_rms_lasts_longer(cadd: MaskedDiffusion, gaps: Gaps) -> None:
    read = {
        unit: [(nearest_row(cadd, gaps, t, unit=unit) == gaps.targets_N).sum() for t in (0.1, 0.5, 1.0)]
        for unit in (False, True)
    }
    assert read[False][0] == read[True][0] == 60
    assert read[False][1] < 40 < read[True][1]
    assert max(read[False][2], read[True][2]) < 5


def test_written_rows_are_divided_as_shards_are(source: ShardSource) -> None:
    index = np.arange(len(source))
    rows = source.gather(index)
    assert (rows["tokens"] == END).any()
    written = Written(rows["tokens"], END)
    assert len(written) == len(source)
    for name, values in written.gather(index[::-1].copy()).items():
        assert torch.equal(values, rows[name].flip(0)), name


def test_the_judge_multiplies_what_it_says_about_each_next_token() -> None:
    judge = byte_model(autoregressive=True)
    rows = [[5, 7, END, 9, 9, 1], [END, 2, 3, 4, END, END], [1, 2, 3, 4, 5, 6]]
    nats = [0.0 for _ in rows]
    for row, tokens in enumerate(rows):
        document: list[int] = []
        for token in tokens:
            context = torch.tensor([[*document, 0]])
            with torch.no_grad():
                log_probs_1V = judge.logits(judge.denoise(context)[:, -1]).log_softmax(1)
            nats[row] -= float(log_probs_1V[0, token])
            document = [] if token == END else [*document, token]
    found = bound(judge, Written(torch.tensor(rows), END))
    assert found.value == pytest.approx(sum(nats) / 18, rel=1e-5)
    assert found.error == pytest.approx(np.std(nats) / 6 / math.sqrt(3), rel=1e-3)


def test_entropy_counts_tokens_within_a_sample() -> None:
    samples = [[1, 1, 2, 3], [4, 4, 4, 4], [0, 1, 2, 3]]
    expected = [-sum(c / 4 * math.log(c / 4) for c in Counter(sample).values()) for sample in samples]
    assert unigram_entropy(torch.tensor(samples), 5) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_runs_differ_in_what_is_compared_alone(budget: str) -> None:
    built = {name: build(job.recipe, job.overrides) for name, job in ABLATIONS.jobs(budget).items()}  # type: ignore[arg-type]
    default = built["cadd"]
    assert default.model.augmentation == AugmentationConfig()
    wanted = {
        "concat": {"fusion": "concat"},
        "reweight": {"fusion": "reweight"},
        "vp": {"path": "vp"},
        "mse_soft": {"mse_weight": 1, "z0": "soft"},
        "mse_hard": {"mse_weight": 1, "z0": "hard"},
    }
    for name, changes in wanted.items():
        model = replace(default.model, augmentation=AugmentationConfig(**changes))  # type: ignore[arg-type]
        assert built[name] == replace(default, model=model)
    plain = replace(default.model, augmentation=None, loss_weight="elbo")
    assert built["mdlm"] == replace(default, name="small_text_mdlm", model=plain)
    assert built["ar"] == replace(default, name="small_text_ar", model=replace(plain, autoregressive=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Runs:
    """All runs of the ablations, a step long and thin."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["model.backbone.dim=16", "model.backbone.num_layers=1", "model.backbone.num_heads=2"]
    data = [f"data.path={shards}", "data.prepare=null", f"data.length={LENGTH}", "data.num_workers=0"]
    short = ["train.steps=1", f"train.batch_tokens={4 * LENGTH}", "train.precision=fp32", "validation.num_sequences=2"]
    for name, job in ABLATIONS.jobs("quick").items():
        train(build(job.recipe, [*job.overrides, *small, *data, *short, f"folder={folder / name}"]))
    return Runs(folder)


def test_noise_levels_come_out_of_runs(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cadd_noise, "ROWS", 30)
    results = NOISE_LEVELS.measure(runs, 0)
    systems = ("cadd", "nearest_row", "nearest_row_literal", "mdlm")
    assert set(results) == {f"t_{t:03d}.{system}.accuracy" for t in range(10, 101, 10) for system in systems}
    assert results["t_010.nearest_row.accuracy"] > 0.9
    assert results["t_100.nearest_row.accuracy"] < 0.2
    assert len({results[f"t_{t:03d}.mdlm.accuracy"] for t in range(10, 101, 10)}) == 1
    NOISE_LEVELS.draw(runs, results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cadd-noise-levels.png"]


def test_ablations_come_out_of_runs(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[AugmentationConfig | None, HintPolicy]] = []

    def numbered(model: MaskedDiffusion, num: int, length: int, policies: Policies, steps: int, *, seed: int) -> Array:
        """The samples' shape, each token the number of the draw."""
        drawn.append((model.config.augmentation, policies.hints))
        assert (policies.amount, policies.order) == (Ancestral(model.config.schedule), "random")
        return np.full_like(draw(model, num, length, policies, steps, seed=seed), len(drawn))

    monkeypatch.setattr(cadd_ablations, "draw", numbered)
    monkeypatch.setattr(cadd_ablations, "SAMPLES", 4)
    monkeypatch.setattr(cadd_ablations, "SAMPLING_STEPS", 3)
    results = ABLATIONS.measure(runs, 0)
    assert {f"held_out.{name}.{'nelbo' if name in ('ar', 'mdlm') else 'nll_discrete'}" for name in RUNS} <= set(results)
    assert 100 < results["baseline.text.gen_ppl"] < 1000
    assert 0 < results["baseline.text.entropy"] < math.log(LENGTH)
    judge, of_draw = runs["ar"].model, {}
    for number, cell in enumerate(drawn, start=1):
        nats = bound(judge, Written(torch.full((4, LENGTH), number), END)).value
        of_draw[round(math.exp(nats), 6)] = cell
    assert len(of_draw) == len(drawn) == 16
    for key, augmentation, hints in (
        ("baseline.mdlm", None, HintPolicy()),
        ("fusion.add", AugmentationConfig(), HintPolicy(1, "soft")),
        ("fusion.concat", AugmentationConfig(fusion="concat"), HintPolicy(1, "soft")),
        ("fusion.reweight", AugmentationConfig(fusion="reweight"), HintPolicy(1, "soft")),
        ("path.flow_matching", AugmentationConfig(), HintPolicy(1, "soft")),
        ("path.vp", AugmentationConfig(path="vp"), HintPolicy(1, "soft")),
        ("objective.z0_hard.ce", AugmentationConfig(), HintPolicy(1, "hard")),
        ("objective.z0_hard.mse_soft", AugmentationConfig(mse_weight=1), HintPolicy(1, "hard")),
        ("objective.z0_soft.mse_hard", AugmentationConfig(mse_weight=1, z0="hard"), HintPolicy(1, "soft")),
        ("hints.k3.soft", AugmentationConfig(), HintPolicy(3, "soft")),
        ("hints.k4.hard", AugmentationConfig(), HintPolicy(4, "hard")),
    ):
        assert of_draw[round(results[f"{key}.gen_ppl"], 6)] == (augmentation, hints), key
    ABLATIONS.draw(runs, results, tmp_path)
    names = {f"cadd-ablations-{part}.png" for part in ("inputs", "objective", "hints")}
    assert {path.name for path in tmp_path.iterdir()} == names
