"""Line charts of a run's measurements, as places in a box that the report's template draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing in a box of 1000 x 1000, origin at the top left; ticks are (place, text)."""

    raw: str
    smooth: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[float]
    points: list[Row]


def chart(
    rows: Sequence[Row],
    column: str,
    *,
    resumes: Sequence[int],
    validation: Sequence[Row] = (),
    floor: float | None = None,
) -> Chart | None:
    """A column of `rows` against the step, raw and smoothed, None if none is finite; validation values as points.

    The vertical axis starts at `floor` if given and leaves out the outermost half percent of the raw values.
    """
    pairs = [(row["step"], row[column]) for row in rows if finite([row], column)]
    if not pairs:
        return None
    steps, values = np.array(pairs, dtype=float).T
    smooth = smoothed(values)
    points = [row for row in validation if finite([row], "value")]
    ends = [row["value"] + side * row["error"] for row in points for side in (-1, 1)]
    reach = np.concatenate([np.quantile(values, (0.005, 0.995)), smooth, ends])
    low, high = float(reach.min() if floor is None else floor), float(reach.max())
    margin = 0.05 * (high - low) or abs(high) or 1.0
    vertical = (high + margin, low - margin if floor is None else low)
    horizontal = (0.0, float(max([steps[-1], 1, *(row["step"] for row in points)])))
    return Chart(
        raw=_path(*thinned(steps, values), horizontal, vertical),
        smooth=_path(*thinned(steps, smooth), horizontal, vertical),
        x_ticks=[(_place(tick, horizontal), short(tick)) for tick in ticks(*horizontal)],
        y_ticks=[(_place(tick, vertical), short(tick)) for tick in ticks(vertical[1], vertical[0])],
        marks=[_place(step, horizontal) for step in resumes],
        points=[
            {
                "x": _place(row["step"], horizontal),
                "y": _place(row["value"], vertical),
                "top": _place(row["value"] + row["error"], vertical),
                "bottom": _place(row["value"] - row["error"], vertical),
                "title": f"step {row['step']}: {row['value']:.4f} +- {row['error']:.4f}",
            }
            for row in points
        ],
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of a centred window, a fortieth of the series wide and narrower at its ends."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def thinned(steps: np.ndarray, values: np.ndarray, columns: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most two points per column of the drawing: the lowest and the highest, so that spikes stay."""
    if len(values) <= 2 * columns:
        return steps, values
    edges = np.linspace(0, len(values), columns + 1).astype(int)
    pairs = [(a + values[a:b].argmin(), a + values[a:b].argmax()) for a, b in pairwise(edges)]
    kept = np.unique(np.array(pairs).ravel())
    return steps[kept], values[kept]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= 0.999 * rough)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _place(value: float, ends: tuple[float, float]) -> float:
    return round(1000 * (value - ends[0]) / (ends[1] - ends[0]), 1)


def _path(steps: np.ndarray, values: np.ndarray, horizontal: tuple[float, float], vertical: tuple[float, float]) -> str:
    corners = [f"{_place(s, horizontal)},{_place(v, vertical)}" for s, v in zip(steps, values)]
    return "M" + "L".join(corners) + ("h0" if len(corners) == 1 else "")


def finite(rows: Sequence[Row], name: str) -> list[float]:
    """The column `name` of those rows in which it is a finite number."""
    return [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def short(value: float) -> str:
    """A number in at most four digits: 21300 as 21.3k, 0.0003 as 3e-4."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and abs(value) >= 1e4:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"
