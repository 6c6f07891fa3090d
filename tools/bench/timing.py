"""Paired timing: the sides alternate, so that whatever else the machine does falls on both."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternate(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each side over `repeats` alternated runs, after one warm-up of both."""
    medians = in_turn({"ours": ours, "theirs": theirs}, repeats)
    return medians["ours"], medians["theirs"]


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of every side over `repeats` rounds in which each runs once, after one round of warm-up."""
    for side in sides.values():
        side()
    rounds = [{name: _seconds(side) for name, side in sides.items()} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in sides}


def beside_the_first(
    sides: Mapping[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of every side, and the median of its speed as a ratio to the first's.

    The first runs before and after every other, and a ratio is taken between neighbours: what the machine does besides
    changes from one minute to the next by more than many sides differ.
    """
    first, *others = sides
    for side in sides.values():
        side()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    speed: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(repeats):
        before = _seconds(sides[first])
        for name in others:
            own, after = _seconds(sides[name]), _seconds(sides[first])
            taken[first].append(after)
            taken[name].append(own)
            speed[name].append((before + after) / (2 * own))
            before = after
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return medians, {name: statistics.median(values) for name, values in speed.items()}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
