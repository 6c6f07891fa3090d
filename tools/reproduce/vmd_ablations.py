"""VMD Appendix E: other origins of z, in sampling or as a learned prior, and decoders that were trained before."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.sudoku import SudokuSource
from data_pipeline.synthetic import support
from eval.sampling.latents import LatentPolicy
from eval.sampling.order import OrderName
from eval.sudoku import validity
from eval.synthetic import accuracy, mean_kl

from .figures import Bar, bars_against_paper, lines
from .samples import ARGMAX, CATEGORICAL, complete, draw
from .sudoku import jobs_of as sudoku_jobs
from .table import Budget, Reproduction, Results
from .training import Job, Runs
from .vmd_pairs import SAMPLES, SET, Length, jobs_of, steps_note
from .vmd_quadruples import BLOCKS, INFERENCE, by_key
from .vmd_quadruples import PAPER as TABLE_2

DATA = {"quick": ("d1",), "full": ("d1", "d2")}
LENGTH: dict[Budget, Length] = {"quick": Length(1000, 400, 1200), "full": Length(1000, 1000, 3000)}
VARIANTS = {
    "vmd_earlier_blocks": ("model.latent.prior=earlier_blocks",),
    "vmd_x_t": ("model.latent.prior=x_t",),
    "vmd_pretrained": ("model.backbone.gates=one",),
    "vmd_frozen": ("model.backbone.gates=one", r"train.freeze=['denoiser\.(?!.*modulation).*']"),
}
"""What a run changes in VMD's."""
START_FROM_MDM = ("vmd_pretrained", "vmd_frozen")
SYSTEMS: dict[str, tuple[str, LatentPolicy]] = {
    "mdm": ("mdm", "kept"),
    "mdm_matched": ("mdm_matched", "kept"),
    "vmd": ("vmd", "kept"),
    "vmd_redrawn": ("vmd", "redrawn"),
    "vmd_earlier_blocks": ("vmd_earlier_blocks", "kept"),
    "vmd_x_t": ("vmd_x_t", "redrawn"),
    "vmd_pretrained": ("vmd_pretrained", "kept"),
    "vmd_frozen": ("vmd_frozen", "kept"),
}
"""The run that a system samples from, and where its z comes from after the first step."""

SUDOKU, PUZZLES, CALLS = "sudoku4", 2000, (2, 5, 10)
ORDERS: dict[str, OrderName] = {"sudoku4": "top_probability", "sudoku4_margin": "margin"}
SUDOKU_SYSTEMS: dict[str, LatentPolicy] = {
    "mdm": "kept",
    "vmd": "kept",
    "vmd_redrawn": "redrawn",
    "vmd_refreshed": "refreshed",
}

NAMES = {
    "mdm": "MDM",
    "mdm_matched": "MDM, as large",
    "vmd": "VMD",
    "vmd_redrawn": "z redrawn",
    "vmd_refreshed": "z refreshed",
    "vmd_earlier_blocks": "p(z | earlier z)",
    "vmd_x_t": "p(z | x_t)",
    "vmd_pretrained": "pretrained",
    "vmd_frozen": "pretrained, frozen",
}


def _jobs(budget: Budget) -> dict[str, Job]:
    sudoku = sudoku_jobs(SUDOKU, budget)
    vmd = replace(sudoku["vmd"], overrides=(*sudoku["vmd"].overrides, "model.latent.prior=normal"))
    jobs = {f"{SUDOKU}.mdm": sudoku["mdm"], f"{SUDOKU}.vmd": vmd}
    for data in DATA[budget]:
        for blocks in BLOCKS:
            jobs |= _quadruple_jobs(data, blocks, budget)
    return jobs


def _quadruple_jobs(data: str, blocks: str, budget: Budget) -> dict[str, Job]:
    prefix = f"{data}.{blocks}"
    plain = jobs_of(f"four_token_{data}", prefix, LENGTH[budget], *BLOCKS[blocks])
    mdm, vmd = (f"{prefix}.{system}" for system in ("mdm", "vmd"))
    changed = {
        f"{prefix}.{name}": replace(
            plain[vmd],
            overrides=(*plain[vmd].overrides, *changes),
            after=mdm if name in START_FROM_MDM else None,
        )
        for name, changes in VARIANTS.items()
        if blocks == "b2" or name != "vmd_earlier_blocks"
    }
    return plain | changed


def _measure(runs: Runs, seed: int) -> Results:
    return _measure_quadruples(runs, seed) | _measure_sudoku(runs, seed)


def _measure_quadruples(runs: Runs, seed: int) -> Results:
    results: Results = {}
    for data in DATA["full"]:
        patterns_PL, probabilities_P = support(data)  # type: ignore[arg-type]
        for inference, (blocks, steps) in INFERENCE.items():
            for system, (run, latent) in SYSTEMS.items():
                if f"{data}.{blocks}.{run}" not in runs:
                    continue
                policies = CATEGORICAL if system.startswith("mdm") else replace(ARGMAX, latent=latent)
                samples_NL = draw(runs[f"{data}.{blocks}.{run}"].model, SAMPLES, 4, policies, steps, seed=seed)
                key = f"{data}.{inference}.{system}"
                results[f"{key}.accuracy"] = accuracy(samples_NL, patterns_PL)
                results[f"{key}.kl"] = mean_kl(patterns_PL, probabilities_P, samples_NL, SET)[0]
    return results


def _measure_sudoku(runs: Runs, seed: int) -> Results:
    rows = SudokuSource(4, "few_clues", "validation", num_rows=PUZZLES, seed=99).gather(np.arange(PUZZLES))
    puzzles, maskable = rows["tokens"], rows["maskable"]
    results: Results = {}
    for setting, order in ORDERS.items():
        for calls in CALLS:
            for system, latent in SUDOKU_SYSTEMS.items():
                model = runs["sudoku4.mdm" if system == "mdm" else "sudoku4.vmd"].model
                policies = replace(ARGMAX, order=order, latent=latent)
                grids = complete(model, puzzles, maskable, policies, calls, seed=seed)
                valid = validity(grids, puzzles.numpy(), maskable.numpy(), 4)
                results[f"{setting}.nfe_{calls}.{system}.valid"] = valid
    return results


def _draw(runs: Runs, results: Results, folder: Path) -> None:
    latents = ("mdm", "mdm_matched", "vmd", "vmd_redrawn", "vmd_earlier_blocks", "vmd_x_t")
    _draw_kl(results, latents, folder / "vmd-ablations-latents.png", title="Four tokens: other origins of z")
    decoders = ("mdm", "vmd", *START_FROM_MDM)
    _draw_kl(results, decoders, folder / "vmd-ablations-pretrained.png", title="Four tokens: decoders trained before")
    for setting, order in ORDERS.items():
        curves = {
            NAMES[system]: ([100 * results[f"{setting}.nfe_{calls}.{system}.valid"] for calls in CALLS], None)
            for system in SUDOKU_SYSTEMS
        }
        lines(
            folder / f"vmd-ablations-{setting.replace('_', '-')}.png",
            CALLS,
            curves,
            xlabel="network calls",
            ylabel="valid grids, %",
            title=f"4 x 4 Sudoku, order by {order.replace('_', ' ')}",
        )


def _draw_kl(results: Results, systems: Sequence[str], path: Path, *, title: str) -> None:
    bars = [
        Bar(
            setting=f"{data.upper()} {inference.upper().replace('_', ' ')}",
            system=NAMES[system],
            value=results[key],
            paper=PAPER.get(key),
        )
        for data in DATA["full"]
        for inference in INFERENCE
        for system in systems
        if (key := f"{data}.{inference}.{system}.kl") in results
    ]
    bars_against_paper(path, bars, xlabel="KL(data, model), nats", title=title, log=True)


SUDOKU_PAPER = {
    f"sudoku9{order}.nfe_{calls}.{system}.valid": share
    for order, system, shares in (
        ("", "vmd", (0.677, 0.764, 0.809)),
        ("", "vmd_redrawn", (0.666, 0.745, 0.844)),
        ("", "vmd_refreshed", (0.668, 0.744, 0.796)),
        ("_margin", "vmd", (0.969, 0.990, 0.997)),
        ("_margin", "vmd_redrawn", (0.969, 0.994, 0.994)),
        ("_margin", "vmd_refreshed", (0.969, 0.993, 0.993)),
    )
    for calls, share in zip((5, 10, 20), shares, strict=True)
}

PAPER = {
    **TABLE_2,
    **by_key(
        {
            ("d1", "vmd_redrawn"): ((1.0, 0.008), (0.985, 0.061), (1.0, 0.030), (0.928, 0.089)),
            ("d2", "vmd_redrawn"): ((1.0, 0.018), (0.965, 0.060), (1.0, 0.552), (0.936, 0.095)),
            ("d1", "vmd_earlier_blocks"): ((1.0, 0.010), (0.977, 0.034), (1.0, 0.023), (0.947, 0.091)),
            ("d2", "vmd_earlier_blocks"): ((1.0, 0.022), (0.961, 0.064), (1.0, 0.502), (0.939, 0.106)),
            ("d1", "vmd_x_t"): ((1.0, 0.011), (0.976, 0.036), (1.0, 0.004), (0.947, 0.056)),
            ("d2", "vmd_x_t"): ((1.0, 0.031), (0.969, 0.063), (1.0, 0.015), (0.926, 0.108)),
            ("d1", "vmd_pretrained"): ((1.0, 0.005), (0.973, 0.045), (1.0, 0.027), (0.933, 0.103)),
            ("d2", "vmd_pretrained"): ((1.0, 0.017), (0.953, 0.064), (0.995, 0.123), (0.926, 0.107)),
            ("d1", "vmd_frozen"): ((1.0, 0.002), (0.967, 0.057), (1.0, 0.012), (0.905, 0.111)),
            ("d2", "vmd_frozen"): ((0.998, 0.029), (0.911, 0.125), (0.991, 0.034), (0.909, 0.120)),
        }
    ),
    **SUDOKU_PAPER,
}

ABLATIONS = Reproduction(
    name="vmd-ablations",
    summary="z redrawn, refreshed or with a learned prior, and a decoder from a trained MDM (Tables 7 to 16)",
    jobs=_jobs,
    measure=_measure,
    draw=_draw,
    paper=PAPER,
    compare=(
        ("vmd", "mdm"),
        ("vmd", "mdm_matched"),
        *((system, "vmd") for system in NAMES if system.startswith("vmd_")),
    ),
    notes=(
        "vmd_redrawn (E.1) and vmd_refreshed (E.4) are other ways of sampling from the runs of vmd, so that with one "
        "step a block they are vmd. p(z | x_t) is asked anew at every step, since it is to adapt to what is revealed.",
        "vmd_earlier_blocks (E.2) needs blocks to condition on; the paper prints it for a single one, too.",
        "vmd_pretrained and vmd_frozen (E.5) start as the trained mdm with open gates and train as long as vmd; "
        "frozen, only the latent's part and the modulation learn.",
        "The paper's Sudoku (Tables 9 and 14, in settings.paper as sudoku9) has 9 x 9 grids with one solution: "
        "76.4 % with z kept, 74.5 % redrawn and 74.4 % refreshed in 10 calls. Here: 4 x 4 grids with many.",
        "On Sudoku z comes from N(0, I) here. vmd-sudoku-small has it from p(z | x_t), beside a control as large.",
        "Four tokens train with batches of 250 rows; quick: D1 alone. " + steps_note(LENGTH),
    ),
)
