"""VMD Section 4.3 on small grids: validity against the number of network calls, with many solutions and with one."""

from pathlib import Path

import numpy as np

from data_pipeline.sudoku import SudokuSource
from eval.sudoku import validity

from .figures import lines
from .samples import ARGMAX, CATEGORICAL, complete
from .table import Budget, Reproduction, Results
from .training import Job, Runs, matched_to

SETTINGS = {
    "sudoku4": (4, "few_clues", "sudoku4_few"),
    "sudoku4_unique": (4, "unique", "sudoku4_unique"),
    "sudoku6": (6, "few_clues", "sudoku6_few"),
    "sudoku6_unique": (6, "unique", "sudoku6_unique"),
}
SYSTEMS = ("mdm", "vmd", "mdm_matched")
CALLS = (1, 2, 3, 4, 5, 10)
PUZZLES = 2000
STEPS = {"quick": {4: 1000, 6: 400}, "full": {4: 4000, 6: 2500}}
ROWS = {4: 256, 6: 128}
DEPTH = {4: (4, 2), 6: (4, 3)}
"""Blocks of the denoiser and of the recognition network."""


def _jobs(budget: Budget) -> dict[str, Job]:
    return {
        f"{setting}.{system}": job
        for setting, (size, _, recipe) in SETTINGS.items()
        for system, job in _jobs_of(recipe, size, STEPS[budget][size]).items()
    }


def _jobs_of(recipe: str, size: int, steps: int) -> dict[str, Job]:
    shared = (
        f"train.steps={steps}",
        f"train.batch_tokens={ROWS[size] * size**2}",
        "train.ema_decay=0.995",
        "train.precision=bf16",
    )
    decoder, encoder = DEPTH[size]
    deep = f"model.backbone.num_layers={decoder}"
    latent = (f"model.latent.recognition.num_layers={encoder}", f"train.kl_anneal_steps={steps * 3 // 10}")
    vmd = Job(f"{recipe}_vmd", (*shared, deep, *latent))
    return {
        "mdm": Job(f"{recipe}_mdm", (*shared, deep)),
        "vmd": vmd,
        "mdm_matched": Job(f"{recipe}_mdm_matched", (*shared, matched_to(vmd))),
    }


def _measure(runs: Runs, seed: int) -> Results:
    results: Results = {}
    for setting, (size, family, _) in SETTINGS.items():
        rows = SudokuSource(size, family, "validation", num_rows=PUZZLES, seed=99).gather(np.arange(PUZZLES))  # type: ignore[arg-type]
        puzzles, maskable = rows["tokens"], rows["maskable"]
        for calls in CALLS:
            for system in SYSTEMS:
                for suffix, policies in (("", ARGMAX), ("_categorical", CATEGORICAL)):
                    model = runs[f"{setting}.{system}"].model
                    grids = complete(model, puzzles, maskable, policies, calls, seed=seed)
                    valid = validity(grids, puzzles.numpy(), maskable.numpy(), size)
                    results[f"{setting}.nfe_{calls}.{system}{suffix}.valid"] = valid
    return results


def _draw(runs: Runs, results: Results, folder: Path) -> None:
    for setting in SETTINGS:
        curves = {
            label: ([100 * results[f"{setting}.nfe_{calls}.{system}.valid"] for calls in CALLS], None)
            for label, system in (("MDM", "mdm"), ("MDM, as large", "mdm_matched"), ("VMD", "vmd"))
        }
        size, family, _ = SETTINGS[setting]
        lines(
            folder / f"vmd-sudoku-small-{setting}.png",
            CALLS,
            curves,
            xlabel="network calls",
            ylabel="valid grids, %",
            title=f"{size} x {size} Sudoku, {'many solutions' if family == 'few_clues' else 'one solution'}",
        )


SUDOKU_SMALL = Reproduction(
    name="vmd-sudoku-small",
    summary="4 x 4 and 6 x 6 Sudoku with many solutions and with one: valid grids against network calls",
    jobs=_jobs,
    measure=_measure,
    draw=_draw,
    paper={},
    notes=(
        "Scored by validity: every row, column and box right and all clues kept. 2,000 held-out puzzles a cell.",
        "Both systems take the most probable token and reveal the most certain cells first (Algorithm 2); categorical "
        "draws have a suffix. The paper has 9 x 9 grids with one solution.",
    ),
)
