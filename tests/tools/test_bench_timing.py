"""Paired timing on a clock of our own: a drifting machine changes the seconds, and hardly the ratios."""

from collections.abc import Callable
from functools import partial

import pytest

from tools.bench import timing


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances a clock that runs slower by a third of a percent for every unit of work done."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def do(units: float) -> None:
        now[0] += units * (1 + now[0] / 300)

    return do


def test_a_slow_drift_does_not_reach_the_ratios(work: Callable[[float], None]) -> None:
    sides = {name: partial(work, units) for name, units in (("plain", 1.0), ("double", 2.0), ("half", 0.5))}
    seconds, speed = timing.beside_the_first(sides, repeats=5)
    assert speed.keys() == {"double", "half"}
    assert speed["double"] == pytest.approx(0.5, rel=0.005)
    assert speed["half"] == pytest.approx(2.0, rel=0.005)
    assert seconds["double"] / seconds["plain"] == pytest.approx(2.0, rel=0.1)


def test_every_side_runs_once_a_round_and_once_before(work: Callable[[float], None]) -> None:
    runs = {"plain": 0, "other": 0}

    def side(name: str) -> None:
        runs[name] += 1
        work(1.0)

    timing.beside_the_first({name: partial(side, name) for name in runs}, repeats=3)
    assert runs == {"plain": 1 + 3 * 2, "other": 1 + 3}
    timing.in_turn({name: partial(side, name) for name in runs}, repeats=3)
    assert runs == {"plain": 11, "other": 8}
