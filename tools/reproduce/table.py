"""What a reproduction is, and how its numbers are put beside the paper's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.table import Table as RichTable

from eval.synthetic import paired

from .training import Job, Runs

Budget = Literal["quick", "full"]
Results = dict[str, float]


@dataclass(frozen=True)
class Reproduction:
    """A table or figure of a paper.

    Args:
        name: as in `penumbra reproduce NAME`.
        summary: what it shows, in one line.
        jobs: the runs that a budget needs, by name.
        measure: numbers by `setting.system.metric` from trained runs and a seed.
        draw: writes figures into a folder.
        paper: the paper's numbers under the same keys.
        compare: pairs of systems (ours, baseline) that several seeds test against each other.
        notes: readings taken, and what fell short.
        examples: further lines for the page.
    """

    name: str
    summary: str
    jobs: Callable[[Budget], dict[str, Job]]
    measure: Callable[[Runs, int], Results]
    draw: Callable[[Runs, Results, Path], None]
    paper: Mapping[str, float]
    compare: Sequence[tuple[str, str]] = (("vmd", "mdm"), ("vmd", "mdm_matched"))
    notes: Sequence[str] = field(default_factory=tuple)
    examples: Callable[[Runs], Sequence[str]] = lambda runs: ()


def over_seeds(per_seed: Sequence[Results], compare: Sequence[tuple[str, str]]) -> Results:
    """Means; with several seeds also standard deviations (KEY_std), paired differences and their p-values."""
    results = {key: statistics.fmean(r[key] for r in per_seed) for key in per_seed[0]}
    if len(per_seed) == 1:
        return results
    spread = {f"{key}_std": statistics.stdev(r[key] for r in per_seed) for key in per_seed[0]}
    return results | spread | _paired(per_seed, compare)


def _paired(per_seed: Sequence[Results], compare: Sequence[tuple[str, str]]) -> Results:
    found: Results = {}
    for key in per_seed[0]:
        setting, system, metric = split(key)
        for ours, baseline in compare:
            other = f"{setting}.{baseline}.{metric}"
            if system == ours and other in per_seed[0]:
                difference, p = paired([r[key] for r in per_seed], [r[other] for r in per_seed])
                found[f"{setting}.{ours}_minus_{baseline}.{metric}"] = difference
                found[f"{setting}.{ours}_minus_{baseline}.{metric}_p"] = p
    return found


def split(key: str) -> tuple[str, str, str]:
    """A dotted key as (setting, system, metric)."""
    setting, system, metric = key.rsplit(".", 2)
    return setting, system, metric


def rows_of(results: Results, paper: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row per setting and metric, a column per system, the paper's number in brackets."""
    shown = [key for key in results if not key.endswith("_std") and key.count(".") >= 2]
    systems = list(dict.fromkeys(split(key)[1] for key in shown))
    lines = list(dict.fromkeys((split(key)[0], split(key)[2]) for key in shown))
    cells = [
        [setting, metric, *(_cell(f"{setting}.{system}.{metric}", results, paper) for system in systems)]
        for setting, metric in lines
    ]
    return ["setting", "metric", *systems], cells


def _cell(key: str, results: Results, paper: Mapping[str, float]) -> str:
    if key not in results:
        return ""
    text = f"{results[key]:.4g}"
    if f"{key}_std" in results:
        text += f" \u00b1 {results[f'{key}_std']:.2g}"
    return text + (f" ({paper[key]:.4g})" if key in paper else "")


def as_rich(title: str, results: Results, paper: Mapping[str, float]) -> RichTable:
    """The table for a terminal."""
    header, cells = rows_of(results, paper)
    table = RichTable(title=title, caption="in brackets: the paper's number")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    return table


def as_markdown(results: Results, paper: Mapping[str, float]) -> str:
    """The table for a page."""
    header, cells = rows_of(results, paper)
    rule = ["---", "---", *("---:" for _ in header[2:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))
