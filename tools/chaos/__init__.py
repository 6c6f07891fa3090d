"""`penumbra chaos`: runs are killed and disturbed at random moments, and must come out as if nothing had happened."""

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from eval.record import Record, write_whole
from pretrain.settings import dump_config
from pretrain.writable import check_writable

from .disk import release, small_disk
from .faults import NUM_RANKS, draw, parse_kinds
from .outcome import Outcome, conduct
from .processes import left_over, refuse_without_proc
from .reference import undisturbed
from .report import as_line, as_table, results
from .tiny_run import tiny_run

ABOUT = "chaos.json"
"""Marks a folder as one of ours, whose trials may be replaced."""


def run_chaos(
    *, trials: int, seed: int, kinds: str, folder: Path, only: int | None = None, json_file: Path | None = None
) -> int:
    """Runs the trials, prints what became of them, and returns the exit code: 0 where all are identical, else 1.

    Args:
        kinds: see `parse_kinds`.
        folder: for the runs; only those of trials with problems stay.
        only: the number of one trial to repeat.

    Raises:
        ValueError: an unknown kind, a folder with something else in it, or what a fault needs is not here.
    """
    chosen = parse_kinds(kinds)
    check_writable(json_file)
    refuse_without_proc()
    _claim(folder, {"seed": seed, "kinds": chosen})
    if "full-disk" in chosen:
        _try_disk(folder)
    record = Record(_settings(trials, seed, chosen, only))
    numbers = range(1, trials + 1) if only is None else [only]
    outcomes = _conduct_all(numbers, seed, chosen, folder)
    Console(width=100).print(as_table(outcomes))
    record.write(results(outcomes), json_file)
    return int(any(outcome.problems for outcome in outcomes))


def _conduct_all(numbers: Sequence[int], seed: int, kinds: Sequence[str], folder: Path) -> list[Outcome]:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"an undisturbed run first, then {len(numbers)} trials of {', '.join(kinds)}, seed {seed}")
    reference = undisturbed(folder / "undisturbed")
    outcomes: list[Outcome] = []
    for number in numbers:
        place = folder / f"trial-{number:03d}"
        with console.status(f"trial {number}"):
            outcomes.append(conduct(draw(number, kinds, seed), place, reference))
        usual = statistics.mean(outcome.seconds for outcome in outcomes)
        console.print(as_line(outcomes[-1], usual * (len(numbers) - len(outcomes))))
        if outcomes[-1].problems:
            for problem in outcomes[-1].problems:
                console.print(f"      {problem}", style="red")
            again = f"penumbra chaos --seed {seed} --kinds {','.join(kinds)} --folder {folder} --only {number}"
            console.print(f"      {place} has its log and its run; to repeat it alone: {again}")
    return outcomes


def _claim(folder: Path, about: dict[str, object]) -> None:
    """Makes the folder, or clears it of what an earlier chaos left.

    Raises:
        ValueError: something else is in it, or trials run there.
    """
    if folder.exists() and not (folder / ABOUT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else: choose another --folder, or remove it")
    if running := left_over(folder):
        raise ValueError(
            f"{folder} has trials that still run (process {', '.join(map(str, running))}): end them, or choose another "
            "--folder"
        )
    for place in folder.glob("trial-*"):
        release(place / "run")
        shutil.rmtree(place)
    shutil.rmtree(folder / "undisturbed", ignore_errors=True)
    write_whole(folder / ABOUT, json.dumps(about))


def _try_disk(folder: Path) -> None:
    with small_disk(folder / "trial-disk" / "run"):
        pass
    shutil.rmtree(folder / "trial-disk")


def _settings(trials: int, seed: int, kinds: Sequence[str], only: int | None) -> dict[str, object]:
    return {
        "trials": trials,
        "seed": seed,
        "kinds": list(kinds),
        "only": only,
        "processes": NUM_RANKS,
        "run": dump_config(tiny_run(Path("RUN"))),
        "identical": "every logged number of every step, the weights, moments and averages of the last checkpoint and "
        "its state, bit for bit as in an undisturbed run; every restart from the newest sealed checkpoint",
        "kills_in_save": "a checkpoint was begun and not sealed when the kill had been sent",
    }
