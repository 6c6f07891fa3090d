"""VMD Table 1 and Figure 2: two tokens that depend on each other, written in one step or one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.synthetic import support
from eval.synthetic import accuracy, kl, mean_kl

from .figures import heatmaps, lines
from .samples import ARGMAX, CATEGORICAL, RANDOM, draw
from .table import Budget, Reproduction, Results
from .training import Job, Runs, matched_to

SETTINGS = ("deterministic", "non_uniform")
SYSTEMS = ("mdm", "vmd", "mdm_matched")
INFERENCE = {"one_step": 1, "token_by_token": 2}
SAMPLES, SET = 40_000, 20_000
CHOICES = {
    True: (ARGMAX, {"categorical": CATEGORICAL}),
    False: (CATEGORICAL, {"argmax": ARGMAX, "random_order": RANDOM}),
}
"""Of a system with a latent and one without: its own way to choose tokens, and others by name."""
STRENGTHS = {"quick": (0.3, 0.8, 1.0), "full": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)}

SMALL = (
    "model.backbone.num_layers=2",
    "optim.lr=4e-3",
    "optim.schedule=cosine",
    "optim.warmup_steps=50",
    "train.ema_decay=0.99",
)


@dataclass(frozen=True)
class Length:
    """Tokens of a batch, and the steps of systems without a latent and of those with one."""

    batch_tokens: int
    baseline_steps: int
    latent_steps: int


LENGTH: dict[Budget, Length] = {"quick": Length(2000, 400, 1200), "full": Length(4000, 1000, 5000)}
STRENGTHS_LENGTH: dict[Budget, Length] = {"quick": LENGTH["quick"], "full": Length(1000, 1000, 5000)}


def steps_note(lengths: Mapping[Budget, Length]) -> str:
    """What a table says about the steps of its runs."""
    quick, full = lengths["quick"], lengths["full"]
    return (
        f"Systems without a latent train {quick.baseline_steps:,} steps (quick) or {full.baseline_steps:,} (full), "
        f"those with one {quick.latent_steps:,} or {full.latent_steps:,}. In one step the former are held by the "
        "independence of their tokens, not by their training; token by token they would gain from more."
    )


def jobs_of(recipe: str, prefix: str, length: Length, *extra: str, latent_dim: int = 32) -> dict[str, Job]:
    """The runs of one setting; latents get a decoder of two blocks and an encoder of one."""
    shared = (*SMALL, f"train.batch_tokens={length.batch_tokens}", *extra)
    base, steps = length.baseline_steps, length.latent_steps
    latent = (
        f"model.latent.dim={latent_dim}",
        "model.latent.recognition.num_layers=1",
        f"train.kl_anneal_steps={steps * 3 // 10}",
    )
    vmd = Job(f"{recipe}_vmd", (*shared, *latent, f"train.steps={steps}"))
    return {
        f"{prefix}.mdm": Job(f"{recipe}_mdm", (*shared, f"train.steps={base}")),
        f"{prefix}.vmd": vmd,
        f"{prefix}.mdm_matched": Job(f"{recipe}_mdm_matched", (*shared, matched_to(vmd), f"train.steps={base}")),
    }


def _table_jobs(budget: Budget) -> dict[str, Job]:
    length = LENGTH[budget]
    return {name: job for setting in SETTINGS for name, job in jobs_of(f"two_token_{setting}", setting, length).items()}


def _measure_table(runs: Runs, seed: int) -> Results:
    results: Results = {}
    for setting in SETTINGS:
        patterns_PL, probabilities_P = support(setting)  # type: ignore[arg-type]
        for inference, steps in INFERENCE.items():
            for system in SYSTEMS:
                model, key = runs[f"{setting}.{system}"].model, f"{setting}.{inference}.{system}"
                own, others = CHOICES[system == "vmd"]
                samples_NL = draw(model, SAMPLES, 2, own, steps, seed=seed)
                results[f"{key}.accuracy"] = accuracy(samples_NL, patterns_PL)
                results[f"{key}.kl"] = mean_kl(patterns_PL, probabilities_P, samples_NL, SET)[0]
                for suffix, policies in others.items():
                    samples_NL = draw(model, SET, 2, policies, steps, seed=seed)
                    results[f"{key}_{suffix}.accuracy"] = accuracy(samples_NL, patterns_PL)
                    results[f"{key}_{suffix}.kl"] = kl(patterns_PL, probabilities_P, samples_NL)
    return results


def _draw_table(runs: Runs, results: Results, folder: Path) -> None:
    for setting in SETTINGS:
        patterns_PL, probabilities_P = support(setting)  # type: ignore[arg-type]
        truth = np.zeros((10, 10))
        truth[patterns_PL[:, 0], patterns_PL[:, 1]] = probabilities_P
        panels = [("data", truth)]
        for system, policies in (("mdm", CATEGORICAL), ("vmd", ARGMAX)):
            samples_NL = draw(runs[f"{setting}.{system}"].model, SET, 2, policies, 1, seed=7)
            panels.append((f"{system.upper()}, one step", joint(samples_NL)))
        name = setting.replace("_", "-")
        heatmaps(folder / f"vmd-table-1-{name}.png", panels, title=f"Two tokens, {name}: joint distribution")


def joint(samples_NL: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The empirical joint distribution [10, 10] of two digits."""
    counts = np.zeros((13, 13))
    np.add.at(counts, (samples_NL[:, 0], samples_NL[:, 1]), 1.0)
    return counts[:10, :10] / len(samples_NL)


TABLE_1 = Reproduction(
    name="vmd-table-1",
    summary="two tokens that depend on each other: accuracy and KL in one step and token by token",
    jobs=_table_jobs,
    measure=_measure_table,
    draw=_draw_table,
    paper={
        f"{setting}.{inference}.{system}.{metric}": value
        for setting, inference, system, value_kl, value_accuracy in (
            ("deterministic", "one_step", "mdm", 2.3, 0.1018),
            ("deterministic", "one_step", "vmd", 0.082, 0.932),
            ("deterministic", "token_by_token", "mdm", 0.001, 0.9997),
            ("deterministic", "token_by_token", "vmd", 0.012, 1.0),
            ("non_uniform", "one_step", "mdm", 2.2, 0.1163),
            ("non_uniform", "one_step", "vmd", 0.081, 0.9304),
            ("non_uniform", "token_by_token", "mdm", 0.023, 0.9996),
            ("non_uniform", "token_by_token", "vmd", 0.009, 0.9998),
        )
        for metric, value in (("kl", value_kl), ("accuracy", value_accuracy))
    },
    notes=(
        "Networks are smaller than the paper's (2 blocks instead of 8, encoder 1 instead of 2), batches are 1,000 "
        "(quick) or 2,000 (full) instead of 10,000; the KL weight ends at 1 (docs/errata.md).",
        steps_note(LENGTH),
        "MDM draws categorically and VMD takes the argmax given z, as in the paper; the other choice has a suffix.",
        "Token by token, the order of top probability is a ranking: of two drawn tokens the one that the model finds "
        "slightly more probable comes first, so slight errors of MDM show in its KL; `random_order` has none of that.",
        "KL is averaged over two sets of 20,000 samples.",
    ),
)


def _strength_jobs(budget: Budget) -> dict[str, Job]:
    length = STRENGTHS_LENGTH[budget]
    return {
        name: job
        for p in STRENGTHS[budget]
        for name, job in jobs_of("two_token_dependence", _setting(p), length, f"data.dependence={p}").items()
    }


def _setting(p: float) -> str:
    return f"p_{round(100 * p):03d}"


def _measure_strengths(runs: Runs, seed: int) -> Results:
    results: Results = {}
    for p in STRENGTHS["full"]:
        if f"{_setting(p)}.vmd" not in runs:
            continue
        patterns_PL, probabilities_P = support("dependence", p)
        for system in SYSTEMS:
            for suffix, policies in (("", CATEGORICAL), ("_argmax", ARGMAX)):
                samples_NL = draw(runs[f"{_setting(p)}.{system}"].model, SET, 2, policies, 1, seed=seed)
                results[f"{_setting(p)}.one_step.{system}{suffix}.kl"] = kl(patterns_PL, probabilities_P, samples_NL)
    return results


def _draw_strengths(runs: Runs, results: Results, folder: Path) -> None:
    strengths = [p for p in STRENGTHS["full"] if f"{_setting(p)}.one_step.vmd.kl" in results]
    curves = {
        label: ([results[f"{_setting(p)}.one_step.{system}.kl"] for p in strengths], None)
        for label, system in (("MDM", "mdm"), ("MDM, as large", "mdm_matched"), ("VMD", "vmd"))
    }
    lines(
        folder / "vmd-figure-2.png",
        strengths,
        curves,
        xlabel="dependence p of the second token on the first",
        ylabel="KL(data, model), nats",
        title="Two tokens in one step, by strength of their dependence",
    )


FIGURE_2 = Reproduction(
    name="vmd-figure-2",
    summary="two tokens in one step: KL against the strength of their dependence",
    jobs=_strength_jobs,
    measure=_measure_strengths,
    draw=_draw_strengths,
    paper={},
    notes=(
        steps_note(STRENGTHS_LENGTH),
        "Both systems draw categorically (with p < 1 the second token is random given the first); the argmax given z "
        "has a suffix. The paper prints Figure 2 without numbers.",
    ),
)
