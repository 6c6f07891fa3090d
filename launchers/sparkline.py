"""Curves and bars out of characters."""

from collections.abc import Sequence
from itertools import pairwise

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a Braille character, by row and column."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def curve(values: Sequence[float], width: int, height: int, low: float, high: float) -> list[str]:
    """A line through the values in `height` rows of `width` Braille characters, 2 x 4 dots each.

    Many values are averaged in groups, few are connected; what lies outside of low ... high runs along the edge.
    """
    columns, rows = 2 * width, 4 * height
    cells = [[0] * width for _ in range(height)]
    span = (high - low) or 1.0
    levels = [round((1 - min(1.0, max(0.0, (v - low) / span))) * (rows - 1)) for v in resample(values, columns)]
    for column, (before, level) in enumerate(pairwise([*levels[:1], *levels])):
        towards = 1 if level > before else -1
        for row in range(before + towards, level + towards, towards) if level != before else (level,):
            cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    return ["".join(chr(0x2800 + bits) for bits in row) for row in cells]


def resample(values: Sequence[float], count: int) -> list[float]:
    """So many values: means of groups of them, or points on the lines between them."""
    if len(values) >= count:
        edges = [n * len(values) // count for n in range(count + 1)]
        return [sum(values[first:end]) / (end - first) for first, end in pairwise(edges)]
    places = [n * (len(values) - 1) / max(1, count - 1) for n in range(count)] if values else []
    return [_between(values, place) for place in places]


def _between(values: Sequence[float], place: float) -> float:
    left = int(place)
    right = min(left + 1, len(values) - 1)
    return values[left] + (place - left) * (values[right] - values[left])


def bar(fraction: float, width: int) -> str:
    """A bar of that share of the width, to an eighth of a character."""
    eighths = round(max(0.0, min(1.0, fraction)) * width * 8)
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[part] if part else "")).ljust(width)
