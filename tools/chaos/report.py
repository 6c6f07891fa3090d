"""What the trials came to: a line for each, a table by kind, numbers by dotted key."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from .outcome import Outcome

COLUMNS = {
    "trials": "trials",
    "identical": "identical",
    "kills": "kills",
    "kills_in_save": "in a save",
    "restarts": "restarts",
    "steps_repeated": "steps again",
    "saves_lost": "lost saves",
    "missed": "too late",
}
"""Counts and their headers."""


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Sums over trials, by the names of COLUMNS."""
    return {
        "trials": len(outcomes),
        "identical": sum(not outcome.problems for outcome in outcomes),
        "kills": sum(outcome.history.kills for outcome in outcomes),
        "kills_in_save": sum(outcome.history.kills_in_save for outcome in outcomes),
        "restarts": sum(outcome.restarts for outcome in outcomes),
        "steps_repeated": sum(outcome.repeated for outcome in outcomes),
        "saves_lost": sum(outcome.saves_lost for outcome in outcomes),
        "missed": sum(outcome.history.missed for outcome in outcomes),
    }


def results(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of all trials as chaos.NAME, and of every kind as chaos.KIND.NAME."""
    found = _with_fraction("chaos", counts(outcomes))
    for kind, of_kind in by_kind(outcomes).items():
        found |= _with_fraction(f"chaos.{kind.replace('-', '_')}", counts(of_kind))
    return found


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """In the order in which they first came."""
    kinds = dict.fromkeys(outcome.trial.kind for outcome in outcomes)
    return {kind: [outcome for outcome in outcomes if outcome.trial.kind == kind] for kind in kinds}


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each kind, and one for all."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for header in ("kind", *COLUMNS.values()):
        table.add_column(header, justify="left" if header == "kind" else "right", no_wrap=True)
    rows = {**by_kind(outcomes), "all": list(outcomes)}
    for kind, of_kind in rows.items():
        numbers = counts(of_kind)
        bad = numbers["identical"] < numbers["trials"]
        table.add_row(kind, *(str(numbers[name]) for name in COLUMNS), style="red" if bad else None)
    return table


def as_line(outcome: Outcome, left: float) -> str:
    """One trial in a line. left: seconds that the others will take."""
    history = outcome.history
    facts = [
        f"{history.kills} killed ({history.kills_in_save} inside a save)" if history.kills else "",
        f"{outcome.restarts} restarts, {outcome.repeated} steps repeated" if outcome.restarts else "",
        f"{outcome.saves_lost} saves lost" if outcome.saves_lost else "",
        f"{history.missed} came too late" if history.missed else "",
        f"{outcome.seconds:.0f} s",
        f"about {left / 60:.0f} min left" if left else "",
    ]
    verdict = "DIFFERENT" if outcome.problems else "identical"
    about = ", ".join(fact for fact in facts if fact)
    return f"trial {outcome.trial.number:>3}  {outcome.trial.kind:<12}  {verdict}  {about}"


def _with_fraction(prefix: str, numbers: Mapping[str, int]) -> dict[str, float]:
    fraction = numbers["identical"] / numbers["trials"]
    return {f"{prefix}.identical_fraction": fraction, **{f"{prefix}.{name}": n for name, n in numbers.items()}}
