"""Figures of the reproductions: data in, one PNG file out, written whole or not at all.

One palette that the colour-blind can tell apart, names beside what they name, nothing drawn that is not data. The
same order of systems gives the same colours in every figure. Each function returns the matplotlib figure it wrote.

Every function raises ValueError if the path does not end in .png or can not be written, if matplotlib is not
installed, and for a number that is not finite.

Shapes: N points, K latent dimensions, J data dimensions.
"""

import contextlib
import io
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

INK, GREY, FAINT = "#1a1a1a", "#6e6e6e", "#e3e3e3"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, 2008
AMOUNT, SIGNED, ORDERED = "Blues", "RdBu_r", "viridis"
STYLE = {
    "font.size": 9,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "savefig.dpi": 160,
}
NUM_NAMED = 12  # up to so many tokens are named one by one


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What one system scored in one setting, the half-width of its error bar, and what the paper prints."""

    setting: str
    system: str
    value: float
    error: float | None = None
    paper: float | None = None


def heatmaps(
    path: Path, panels: Sequence[tuple[str, Array]], *, title: str, num_columns: int | None = None
) -> "Figure":
    """Joint distributions of two tokens on one colour scale (VMD Figures 3 to 5).

    Args:
        panels: title and matrix of probabilities, the first token down, the second across.
        num_columns: panels side by side, all of them if None; every row is full.
    """
    _refuse_infinite(panels)
    num_columns = num_columns or len(panels)
    num_rows, rest = divmod(len(panels), num_columns)
    assert rest == 0, f"{len(panels)} panels do not fill rows of {num_columns}"
    top = max(matrix.max() for _, matrix in panels)
    with _drawing(path, title, num_rows, num_columns, width=2.2 * num_columns + 0.8, height=2.4 * num_rows) as figure:
        grid = list(figure.axes)
        for axes, (name, matrix) in zip(grid, panels):
            image = axes.imshow(matrix, cmap=AMOUNT, vmin=0, vmax=top)
            axes.set(title=name, xlabel="second token", ylabel="first token")
            axes.locator_params(integer=True, nbins=6)
            _frame(axes)
        _colour_bar(grid, image, "probability")
    return figure


def histograms_2d(
    path: Path, rows: Sequence[tuple[str, Sequence[tuple[str, Array]]]], *, title: str, num_values: int = 100
) -> "Figure":
    """Samples of two tokens as images, a row for each data set and a column for each system (VADD Figure 5).

    Args:
        rows: name and panels, each a title and samples [N, 2]. A row has the colour scale of its first panel.
    """
    num_columns = len(rows[0][1])
    edges, ticks = np.arange(num_values + 1) - 0.5, (0, num_values // 2, num_values - 1)
    with _drawing(
        path, title, len(rows), num_columns, width=1.75 * num_columns + 0.6, height=2.0 * len(rows)
    ) as figure:
        grid = np.array(figure.axes).reshape(len(rows), num_columns)
        for line, (row_name, panels) in zip(grid, rows):
            counts = [np.histogram2d(samples_N2[:, 0], samples_N2[:, 1], bins=edges)[0] for _, samples_N2 in panels]
            shares = [count / count.sum() for count in counts]
            top = np.quantile(shares[0][shares[0] > 0], 0.99)
            for axes, (name, _), share in zip(line, panels, shares, strict=True):
                axes.imshow(share.T, origin="lower", interpolation="nearest", cmap=AMOUNT, vmin=0, vmax=top)
                axes.set(title=name, xlabel="first token", ylabel="second token", xticks=ticks, yticks=ticks)
                _frame(axes)
            line[0].set_title(f"{row_name}: {panels[0][0]}")
    return figure


def lines(
    path: Path,
    x: Sequence[float],
    series: Mapping[str, tuple[Sequence[float], Sequence[float] | None]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> "Figure":
    """A curve for each system, named at its end (VMD Figure 2).

    Args:
        series: values at each x, and the half-widths of their errors or None.
        log_x: a scale of powers of two with a tick at each x.
    """
    _refuse_infinite((name, part) for name, parts in series.items() for part in parts if part is not None)
    assert len(series) <= len(COLOURS), "more curves than colours"
    with _drawing(path, title, width=6.0, height=3.4) as figure:
        (axes,) = figure.axes
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log_y else "linear")
        if log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{value:g}" for value in x])
        ends = []
        for colour, (name, (y, error)) in zip(COLOURS, series.items()):
            ends.append((float(y[-1]), name, colour))
            axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8)
            if error is not None:
                axes.fill_between(x, np.subtract(y, error), np.add(y, error), color=colour, alpha=0.15, linewidth=0)
        _name_ends(axes, ends)
    return figure


def bars_against_paper(path: Path, bars: Sequence[Bar], *, xlabel: str, title: str, log: bool = False) -> "Figure":
    """A table as bars: systems under each setting, a diamond where the paper stands, both numbers at the right.

    Args:
        log: a logarithmic scale, from the power of ten below the least number.
    """
    _refuse_infinite((f"{bar.setting}, {bar.system}", [bar.value, bar.error or 0, bar.paper or 0]) for bar in bars)
    systems = list(dict.fromkeys(bar.system for bar in bars))
    groups = {setting: [bar for bar in bars if bar.setting == setting] for setting in (bar.setting for bar in bars)}
    positive = [number for bar in bars for number in (bar.value, bar.paper or 0) if number > 0]
    start = 10.0 ** np.floor(np.log10(min(positive))) if log else 0.0
    num_rows = len(bars) + 1.3 * len(groups)
    with _drawing(path, title, width=7.2, height=0.19 * num_rows + 0.5) as figure:
        (axes,) = figure.axes
        axes.grid(axis="x")
        axes.set(xlabel=xlabel, xscale="log" if log else "linear", ylim=(num_rows - 0.6, -0.6))
        row, rows = 0.0, []
        for setting, group in groups.items():
            axes.text(0.005, row, setting, weight="bold", va="center", transform=axes.get_yaxis_transform())
            for bar in group:
                row += 1
                rows.append(row)
                _bar(axes, row, bar, start, COLOURS[systems.index(bar.system)])
            row += 1.3
        _beside(axes, 0, 85, "measured", color=GREY)
        if any(bar.paper is not None for bar in bars):
            _beside(axes, 0, 135, "\N{WHITE DIAMOND} paper", color=GREY)
        axes.set_yticks(rows, [bar.system for group in groups.values() for bar in group])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=start)
    return figure


def latent_maps(
    path: Path,
    panels: Sequence[tuple[str, Array, Array]],
    *,
    title: str,
    label: str,
    axes_names: tuple[str, str] = ("first latent dimension", "second latent dimension"),
) -> "Figure":
    """Latents in the plane, coloured by what they stand for: a panel for each system, block or data dimension.

    Args:
        panels: title, latents [N, 2] and values [N]; a few tokens are also named at the median of their latents.
        label: what the colour is.
        axes_names: what the plane is, if the latents were projected.
    """
    _refuse_infinite((name, part) for name, *parts in panels for part in parts)
    values = np.unique(np.concatenate([values_N for _, _, values_N in panels]))
    reach = 1.05 * max(np.abs(latents_N2).max() for _, latents_N2, _ in panels)
    with _drawing(path, title, 1, len(panels), width=2.6 * len(panels) + 0.8, height=2.8) as figure:
        drawn = list(figure.axes)
        named = values if len(values) <= NUM_NAMED else None
        for axes, (name, latents_N2, values_N) in zip(drawn, panels):
            order = np.random.default_rng(0).permutation(len(values_N))
            x, y = latents_N2[order].T
            image = axes.scatter(x, y, c=values_N[order], s=4, linewidths=0, **_ordered(values))
            axes.set(title=name, xlabel=axes_names[0], ylabel=axes_names[1], aspect="equal")
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
            axes.label_outer()
            if named is not None:
                _name_medians(axes, latents_N2, values_N, apart=0.1 * reach)
        _colour_bar(drawn, image, label, ticks=named)
    return figure


def correlation(
    path: Path, matrix_KJ: Array, row_names: Sequence[str], column_names: Sequence[str], *, title: str
) -> "Figure":
    """Correlations of latent dimensions (down) with data dimensions (across), each cell with its number."""
    _refuse_infinite([(title, matrix_KJ)])
    num_rows, num_columns = matrix_KJ.shape
    width = 0.55 * num_columns + 0.08 * max(map(len, row_names)) + 1.2
    with _drawing(path, title, width=max(width, 3.0), height=0.3 * num_rows + 0.6) as figure:
        (axes,) = figure.axes
        axes.imshow(matrix_KJ, cmap=SIGNED, vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(num_columns), column_names)
        axes.set_yticks(range(num_rows), row_names)
        axes.tick_params(length=0)
        _frame(axes)
        for (row, column), value in np.ndenumerate(matrix_KJ):
            colour = "white" if abs(value) > 0.6 else INK
            text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


@contextlib.contextmanager
def _drawing(
    path: Path, title: str, num_rows: int = 1, num_columns: int = 1, *, width: float, height: float
) -> Iterator["Figure"]:
    """A figure of axes in the house style, written when the block ends; inches, the title not counted."""
    if path.suffix != ".png":
        raise ValueError(f"figures are PNG files: end {path} in .png")
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install 'penumbra-diffusion[figures]'") from None
    lines_of_title = textwrap.wrap(title, int(11 * width))
    with style.context(["default", STYLE]):
        figure = Figure((width, height + 0.25 * len(lines_of_title)), layout="compressed")
        figure.subplots(num_rows, num_columns)
        figure.suptitle("\n".join(lines_of_title), x=0.012, ha="left")
        yield figure
        _write(path, figure)


def _write(path: Path, figure: "Figure") -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(image.getvalue())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ValueError(f"{path} can not be written ({error}): choose another place") from None


def _refuse_infinite(numbers: Iterable[tuple[str, Any]]) -> None:
    for name, values in numbers:
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name!r} has a number that is not finite: measure it again, or leave it out of the figure"
            )


def _frame(axes: "Axes") -> None:
    """Images: a faint frame, and axis names at the outer panels only."""
    axes.spines[:].set(visible=True, color=FAINT)
    axes.label_outer()


def _colour_bar(axes: Sequence["Axes"], image: "ScalarMappable", label: str, ticks: Array | None = None) -> None:
    bar = axes[0].figure.colorbar(image, ax=axes, label=label, ticks=ticks, fraction=0.05, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _ordered(values: Array) -> dict[str, Any]:
    """How a scatter colours `values`: a colour for each of a few tokens, else a continuous scale."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    if len(values) > NUM_NAMED:
        return {"cmap": ORDERED, "vmin": values[0], "vmax": values[-1]}
    edges = np.concatenate([[values[0] - 0.5], (values[1:] + values[:-1]) / 2, [values[-1] + 0.5]])
    colours = colormaps[ORDERED].resampled(len(values))
    return {"cmap": colours, "norm": BoundaryNorm(edges, len(values))}


def _beside(axes: "Axes", row: float, points: float, text: str, **style: Any) -> None:
    """Text that ends so many points to the right of the axes, in a row of the data."""
    axes.annotate(
        text, (1, row), (points, 0), axes.get_yaxis_transform(), "offset points", ha="right", va="center", **style
    )


def _number(value: float, form: str) -> str:
    """In a form of few digits, and large ones without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:{form}}".rstrip(".")


def _bar(axes: "Axes", row: float, bar: Bar, start: float, colour: str) -> None:
    axes.barh(row, max(bar.value - start, 0.0), left=start, height=0.78, color=colour)
    measured = _number(bar.value, "#.3g")
    if bar.error is not None:
        axes.errorbar(bar.value, row, xerr=bar.error, color=INK, linewidth=1)
        measured += f" \N{PLUS-MINUS SIGN} {_number(bar.error, '.2g')}"
    _beside(axes, row, 85, measured, color=colour, weight="bold")
    if bar.paper is not None:
        axes.plot(bar.paper, row, "D", color="white", markeredgecolor=INK, markersize=4.5, clip_on=False)
        _beside(axes, row, 135, f"{bar.paper:g}")


def _name_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Names (end of the curve, name, colour) at the right, as near their curves as they fit (isotonic regression)."""
    axes.autoscale_view()
    to_share = axes.transScale + axes.transLimits
    gap, blocks = 0.06, list[list[float]]()
    for number, (y, _, _) in enumerate(sorted(ends)):
        blocks.append([to_share.transform((1.0, y))[1] - gap * number])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    places = [np.mean(block) for block in blocks for _ in block] + gap * np.arange(len(ends))
    for place, (_, name, colour) in zip(places, sorted(ends)):
        axes.text(1.01, place, name, color=colour, va="center", weight="bold", transform=axes.transAxes)


def _name_medians(axes: "Axes", latents_N2: Array, values_N: Array, apart: float) -> None:
    """Each value at the median of its latents, unless some of these are nearer than `apart`: then none is."""
    from matplotlib.patheffects import withStroke

    values_P = np.unique(values_N)
    medians_P2 = np.array([np.median(latents_N2[values_N == value], axis=0) for value in values_P])
    distances_PP = np.linalg.norm(medians_P2[:, None] - medians_P2, axis=-1)
    if (distances_PP < apart).sum() > len(values_P):
        return
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for value, (x, y) in zip(values_P, medians_P2):
        axes.text(x, y, f"{value:g}", ha="center", va="center", weight="bold", path_effects=halo)
