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


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
