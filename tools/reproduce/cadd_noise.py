"""CADD Table 12: how much noise a hint bears before its token is lost, to the model and to the nearest embedding.

Shapes: N held-out rows, one token hidden in each; L positions, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.packing import Source
from data_pipeline.tokenizers import Tokenizer
from model.batch import Batch
from model.diffusion import MaskedDiffusion
from model.noise import NoiseKey
from pretrain.checkpoint.load import Loaded
from pretrain.data import open_data
from pretrain.parallel.mesh import single_process
from pretrain.settings import load_config

from .figures import lines
from .table import Budget, Reproduction, Results
from .training import Job, Runs

LEVELS = tuple(number / 10 for number in range(1, 11))
ROWS = 2000
STEPS = {"quick": ("train.steps=4000", "train.batch_tokens=2048"), "full": ("train.steps=4000",)}
SYSTEMS = {
    "hint and context: CADD": "cadd",
    "hint alone": "nearest_row",
    "hint alone, unit RMS": "nearest_row_literal",
    "context alone: MDLM": "mdlm",
}
SHOWN, CONTEXT, BLANK = 6, 9, "\N{OPEN BOX}"


def _jobs(budget: Budget) -> dict[str, Job]:
    return {system: Job(f"small_text_{system}", STEPS[budget]) for system in ("cadd", "mdlm")}


def held_out(run: Loaded) -> Source:
    """The rows that a run was validated on."""
    data = open_data(load_config(run.run / "config.yaml").data, single_process().world)
    assert data.validation is not None, "small_text holds documents out"
    return data.validation


@dataclass(frozen=True)
class Gaps:
    """Rows, a hidden place in each, and the noise of its hint, the same at every level."""

    batch: Batch
    place_N: Tensor
    noise_ND: Tensor

    @property
    def targets_N(self) -> Tensor:
        """The hidden tokens."""
        return self.batch.tokens_BL.gather(1, self.place_N[:, None])[:, 0]


def hide_one_each(source: Source, num_rows: int, dim: int, seed: int) -> Gaps:
    """The first rows of a source, with a random place in each."""
    index_N = torch.arange(min(num_rows, len(source)))
    batch = Batch.of({**source.gather(index_N.numpy()), "index": index_N})
    key = NoiseKey(seed, 0, index_N)
    place_N = (key.stream("place").uniform(1)[:, 0] * batch.tokens_BL.shape[1]).long()
    return Gaps(batch, place_N, key.stream("hint").normal(dim))


def hints(model: MaskedDiffusion, gaps: Gaps, z0_VD: Tensor, t: float) -> Tensor:
    """z_t of the hidden tokens [N, D], their clean embeddings being rows of z0_VD."""
    assert model.augmentation is not None
    t_N = torch.full(gaps.place_N.shape, t, dtype=torch.float64)
    return model.augmentation.noisy(z0_VD[gaps.targets_N], t_N, gaps.noise_ND)


@torch.inference_mode()
def fill(model: MaskedDiffusion, gaps: Gaps, t: float) -> Tensor:
    """The most probable token at each gap [N], given the rest of its row and, where a model takes it, a hint."""
    batch, at = gaps.batch, (torch.arange(len(gaps.place_N)), gaps.place_N)
    hint_NLD = None
    if model.augmentation is not None:
        z0_VD = model.augmentation.clean(model.denoiser.embed.weight)
        empty_NLD = torch.zeros(*batch.tokens_BL.shape, z0_VD.shape[1])
        hint_NLD = empty_NLD.index_put(at, hints(model, gaps, z0_VD, t))
    hidden_NLD = model.denoise(
        batch.tokens_BL.index_put(at, torch.tensor(model.config.mask_id)),
        t=torch.full(gaps.place_N.shape, t, dtype=torch.float64),
        mask=model.mask(document_BL=batch.document_BL),
        hint=hint_NLD,
        positions=batch.positions_BL,
    )
    return model.logits(hidden_NLD[at]).argmax(1)


@torch.inference_mode()
def nearest_row(model: MaskedDiffusion, gaps: Gaps, t: float, *, unit: bool) -> Tensor:
    """The token [N] whose normalised embedding is nearest to the hint alone, at the model's scale or at unit RMS."""
    assert model.augmentation is not None
    direction_VD = F.normalize(model.denoiser.embed.weight)
    z0_VD = direction_VD * direction_VD.shape[1] ** 0.5 if unit else model.augmentation.clean(direction_VD)
    score_NV = hints(model, gaps, z0_VD, t) @ direction_VD.T
    score_NV[:, model.config.mask_id] = -torch.inf
    return score_NV.argmax(1)


def _measure(runs: Runs, seed: int) -> Results:
    cadd, mdlm = runs["cadd"].model, runs["mdlm"].model
    gaps = hide_one_each(held_out(runs["cadd"]), ROWS, cadd.config.backbone.dim, seed)
    without_hint_N = fill(mdlm, gaps, 1.0)
    results: Results = {}
    for t in LEVELS:
        filled = {
            "cadd": fill(cadd, gaps, t),
            "nearest_row": nearest_row(cadd, gaps, t, unit=False),
            "nearest_row_literal": nearest_row(cadd, gaps, t, unit=True),
            "mdlm": without_hint_N,
        }
        for system, tokens_N in filled.items():
            share = (tokens_N == gaps.targets_N).double().mean()
            results[f"{_setting(t)}.{system}.accuracy"] = float(share)
    return results


def _setting(t: float) -> str:
    return f"t_{round(100 * t):03d}"


def _draw(runs: Runs, results: Results, folder: Path) -> None:
    curves = {
        label: ([100 * results[f"{_setting(t)}.{system}.accuracy"] for t in LEVELS], None)
        for label, system in SYSTEMS.items()
    }
    lines(
        folder / "cadd-noise-levels.png",
        LEVELS,
        curves,
        xlabel="noise level t of the hint",
        ylabel="hidden token recovered, %",
        title="One hidden token of a row, by the noise of its hint",
    )


def _examples(runs: Runs) -> Sequence[str]:
    """The first hidden words, and what CADD reads in their places."""
    run = runs["cadd"]
    assert run.tokenizer is not None
    gaps = hide_one_each(held_out(run), 20 * SHOWN, run.model.config.backbone.dim, seed=0)
    words = [n for n, token in enumerate(gaps.targets_N.tolist()) if len(_plain(run.tokenizer, [token]).strip()) > 3]
    read = {t: fill(run.model, gaps, t) for t in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)}
    shown = ["The first hidden words of the held-out rows, and what the model reads in their places by noise level:"]
    for n in words[:SHOWN]:
        place, row = int(gaps.place_N[n]), gaps.batch.tokens_BL[n].tolist()
        before, token, after = (
            _plain(run.tokenizer, ids)
            for ids in (row[max(0, place - CONTEXT) : place], row[place : place + 1], row[place + 1 :][:CONTEXT])
        )
        readings = [(t, _plain(run.tokenizer, [int(tokens_N[n])]).strip()) for t, tokens_N in read.items()]
        read_at = "   ".join(f"{t} {text or BLANK}" for t, text in readings)
        shown += ["", f"    {before}[{token}]{after}", f"    {read_at}"]
    return [*shown, ""]


def _plain(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text on one line."""
    return tokenizer.decode(ids, keep_special=True).replace("\n", "\N{RETURN SYMBOL}")


NOISE_LEVELS = Reproduction(
    name="cadd-noise-levels",
    summary="one hidden token with a hint of it: recovered by noise level, by the model and by the nearest embedding",
    jobs=_jobs,
    measure=_measure,
    draw=_draw,
    paper={},
    compare=(("cadd", "mdlm"), ("cadd", "nearest_row")),
    examples=_examples,
    notes=(
        f"One random token in each of {ROWS:,} held-out rows is hidden, all others are visible; the hint is its "
        "embedding at noise level t, with the same noise at every level. MDLM has no hint.",
        "nearest_row decodes the hint alone at the scale the model was trained with (half-life 0.4); "
        "nearest_row_literal at unit RMS, where `scale: literal` begins: the hint is then the answer far beyond "
        "t = 0.5, and further still at the paper's width (docs/errata.md).",
        'Table 12 shows one sentence, "A [model] sits on the mat": recovered at t = 0.1 and 0.3, lost from 0.5 on.',
        "In training a token whose hint is at level t is one of a share t of hidden tokens; here it is the only one.",
    ),
)
