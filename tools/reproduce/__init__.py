"""`penumbra reproduce`: trains what a paper's table needs, puts our numbers beside the paper's, and draws them."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.record import Record, write_whole
from pretrain.writable import check_writable

from .table import Budget, Reproduction, as_markdown, as_rich, over_seeds
from .training import train_all


def reproductions() -> dict[str, Reproduction]:
    """All tables and figures by name."""
    from .cadd_ablations import ABLATIONS as CADD_ABLATIONS
    from .cadd_noise import NOISE_LEVELS
    from .sudoku import SUDOKU_SMALL
    from .vadd_points import TABLE_1 as VADD_TABLE_1
    from .vmd_ablations import ABLATIONS
    from .vmd_needle import NEEDLE
    from .vmd_pairs import FIGURE_2, TABLE_1
    from .vmd_quadruples import TABLE_2

    tables = (VADD_TABLE_1, TABLE_1, FIGURE_2, TABLE_2, NEEDLE, SUDOKU_SMALL, ABLATIONS, NOISE_LEVELS, CADD_ABLATIONS)
    return {each.name: each for each in tables}


def find(name: str) -> Reproduction:
    """A reproduction by name.

    Raises:
        ValueError: no such table.
    """
    known = reproductions()
    if name not in known:
        raise ValueError(f"{name!r} is not a table to reproduce: use one of {', '.join(known)}")
    return known[name]


def list_reproductions() -> str:
    """One line per table."""
    known = reproductions()
    width = max(len(name) for name in known)
    return "\n".join(f"{name:<{width}}  {each.summary}" for name, each in known.items())


def reproduce(name: str, budget: Budget, *, seeds: int, out: Path | None, json_file: Path | None) -> None:
    """Trains (or goes on training), measures, prints, and writes NAME.json, NAME.md and figures."""
    started = time.monotonic()
    table = find(name)
    runs_folder = Path("runs") / "reproduce" / f"{name}-{budget}"
    out = out or runs_folder
    check_writable(out / f"{name}.json", json_file)
    jobs = table.jobs(budget)
    all_runs = [train_all(jobs, runs_folder / f"seed-{seed}", seed) for seed in range(seeds)]
    record = Record(
        {
            "table": name,
            "budget": budget,
            "seeds": seeds,
            "training_seconds": {job: round(all_runs[0].seconds(job)) for job in jobs},
            "training_processor_seconds": {job: round(all_runs[0].seconds(job, "processor_seconds")) for job in jobs},
            "training_commits": {job: all_runs[0].commits(job) for job in jobs},
            "latents": {job: found for job in jobs if (found := all_runs[0].latent(job))},
            "runs": {job: asdict(spec) for job, spec in jobs.items()},
            "paper": dict(table.paper),
            "notes": list(table.notes),
        },
        started=started,
    )
    results = over_seeds([table.measure(runs, seed) for seed, runs in enumerate(all_runs)], table.compare)
    Console(width=200).print(as_rich(f"{name}: {table.summary} ({budget})", results, table.paper))
    about = record.as_dict(results)  # before a committed record is replaced, which makes the checkout dirty
    record.write(results, out / f"{name}.json", json_file)
    table.draw(all_runs[0], results, out)
    figures = sorted(path.name for path in out.glob(f"{name}*.png"))
    write_whole(out / f"{name}.md", _page(table, about, results, figures, table.examples(all_runs[0])))
    print(f"written to {out / name}.json, .md and {', '.join(figures)}")


def _page(
    table: Reproduction, about: dict[str, Any], results: dict[str, float], figures: list[str], examples: Sequence[str]
) -> str:
    wall, busy = (
        max(about["settings"][key].values(), default=0) for key in ("training_seconds", "training_processor_seconds")
    )
    lines = [
        f"# {table.name}: {table.summary}",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['machine']['processor']}, "
        f"{about['machine']['cores']} cores, torch {about['versions']['torch']}; the longest run trained "
        f"{wall // 60} min {wall % 60} s, of which its core worked {busy // 60} min {busy % 60} s. "
        "In brackets: the paper's number.",
        "",
        as_markdown(results, table.paper),
        "",
        *(f"- {note}" for note in table.notes),
        "",
        *examples,
        *(f"![{name}]({name})" for name in figures),
    ]
    return "\n".join(lines) + "\n"
