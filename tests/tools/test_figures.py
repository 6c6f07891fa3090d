"""Figures show the numbers they were given, legibly, and are written whole or not at all."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from tools.reproduce.figures import (
    COLOURS,
    Bar,
    bars_against_paper,
    correlation,
    heatmaps,
    histograms_2d,
    latent_maps,
    lines,
)

RNG = np.random.default_rng(0)
JOINT = RNG.dirichlet(np.ones(100)).reshape(10, 10)
POINTS = RNG.integers(0, 100, (1000, 2))
TOKENS = np.repeat(np.arange(10), 30)
RING = np.stack([np.cos(TOKENS), np.sin(TOKENS)], axis=1) + RNG.normal(0, 0.05, (300, 2))
SETTINGS = [f"D{data}, B = {blocks}, NFE {nfe}" for data in (1, 2) for blocks in (2, 1) for nfe in (4, 1)]
TABLE = [
    Bar(setting=setting, system=system, value=value, error=0.4, paper=None if system == "ours" else value + 1)
    for setting in SETTINGS
    for system, value in (("MDM", 9.3), ("VMD", 96.0), ("ours", 50.0))
]
CURVES: dict[str, tuple[list[float], list[float] | None]] = {
    name: ([0.0, end], [0.1, 0.2]) for name, end in (("MDM", 2.0), ("VMD", 0.11), ("VADD", 0.1), ("floor", 0.0))
}

DRAW: dict[str, Callable[[Path], Figure]] = {
    "heatmaps": lambda path: heatmaps(path, [("data", JOINT), ("MDM", JOINT.T)], title="Joint distribution"),
    "histograms": lambda path: histograms_2d(path, [("swissroll", [("data", POINTS)])], title="Samples"),
    "lines": lambda path: lines(path, [0.1, 1.0], CURVES, xlabel="p", ylabel="KL (nats)", title="KL against p"),
    "bars": lambda path: bars_against_paper(path, TABLE, xlabel="accuracy (%)", title="Accuracy"),
    "latents": lambda path: latent_maps(path, [("VMD", RING, TOKENS)], title="Latents", label="first token"),
    "correlation": lambda path: correlation(path, JOINT, list("abcdefghij"), list("klmnopqrst"), title="Correlation"),
}


@pytest.mark.parametrize("name", DRAW)
def test_figure_is_a_png_of_a_size_for_the_screen_with_nothing_cut_off(name: str, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    path = tmp_path / "new" / f"{name}.png"
    figure = DRAW[name](path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert all(300 <= side <= 2400 for side in image.size)
        grey = np.array(image.convert("L"))
    assert all(side.min() == 255 for side in (grey[0], grey[-1], grey[:, 0], grey[:, -1])), "something is at the edge"
    assert grey.min() < 60
    assert figure.get_suptitle()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert dict(mpl.rcParams) == before
    first = path.read_bytes()
    DRAW[name](path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("name", DRAW)
def test_no_two_texts_overlap(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: dict[Text, Bbox] = {}
    draw = Text.draw

    def draw_and_note(text: Text, renderer: RendererBase) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            boxes[text] = text.get_window_extent(renderer)

    monkeypatch.setattr(Text, "draw", draw_and_note)
    DRAW[name](tmp_path / "a.png")
    assert len(boxes) > 5
    for (text, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(other_box), f"{text.get_text()!r} and {other.get_text()!r}"


def test_heatmaps_share_one_scale_and_hold_the_probabilities(tmp_path: Path) -> None:
    panels = [(f"panel {number}", JOINT / (number + 1)) for number in range(6)]
    figure = heatmaps(tmp_path / "a.png", panels, title="t", num_columns=3)
    images = [axes.images[0] for axes in figure.axes[:6]]
    assert {image.get_clim() for image in images} == {(0, JOINT.max())}
    for image, (name, matrix) in zip(images, panels):
        assert image.axes.get_title(loc="left") == name
        np.testing.assert_array_equal(image.get_array(), matrix)
    assert figure.axes[6].get_ylabel() == "probability"
    with pytest.raises(AssertionError, match="do not fill rows"):
        heatmaps(tmp_path / "b.png", panels, title="t", num_columns=4)


def test_histograms_put_the_first_token_across_and_the_second_up(tmp_path: Path) -> None:
    samples = np.array([(3, 7)] * 3 + [(0, 9)])
    figure = histograms_2d(tmp_path / "a.png", [("toy", [("data", samples), ("b", samples)])], title="t", num_values=10)
    image = figure.axes[0].images[0]
    expected = np.zeros((10, 10))
    expected[7, 3], expected[9, 0] = 0.75, 0.25
    np.testing.assert_array_equal(image.get_array(), expected)
    assert image.origin == "lower"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["toy: data", "b"]
    assert image.get_clim() == figure.axes[1].images[0].get_clim()


def named_ends(axes: Axes) -> dict[str, tuple[float, str]]:
    """Height of each curve's name, as a share of the axes, and its colour."""
    return {text.get_text(): (float(text.get_position()[1]), to_hex(text.get_color())) for text in axes.texts}


def test_lines_are_named_at_their_ends(tmp_path: Path) -> None:
    series: dict[str, tuple[list[float], list[float] | None]] = {
        "MDM": ([1, 5, 10.0], [0.5, 1, 2]),
        "VMD": ([1, 1, 0.0], None),
        "near": ([2, 2, 0.1], None),
    }
    figure = lines(tmp_path / "a.png", [1, 2, 8], series, xlabel="NFE", ylabel="y", title="t", log_x=True)
    (axes,) = figure.axes
    for line, (y, _), colour in zip(axes.lines, series.values(), COLOURS):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 2, 8], y], axis=1))
        assert line.get_color() == colour
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "8"]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band} >= {(1, 0.5), (1, 1.5), (8, 8), (8, 12)}

    ends = named_ends(axes)
    share = axes.transLimits.transform([(0, 10.0), (0, 0.0), (0, 0.1)])[:, 1]
    assert ends["MDM"] == (pytest.approx(share[0]), COLOURS[0])
    assert ends["near"][0] - ends["VMD"][0] == pytest.approx(0.06)
    assert ends["near"][0] + ends["VMD"][0] == pytest.approx(share[1] + share[2]), "moved apart evenly"


def test_names_of_six_curves_that_end_together_keep_their_order_and_distance(tmp_path: Path) -> None:
    series = {f"s{number}": ([0.0, 1 + 1e-3 * number], None) for number in (3, 1, 5, 0, 4, 2)}
    figure = lines(tmp_path / "a.png", [0, 1], series, xlabel="x", ylabel="y", title="t", log_y=False)
    ends = named_ends(figure.axes[0])
    np.testing.assert_allclose(np.diff([ends[f"s{number}"][0] for number in range(6)]), 0.06)


def test_bars_reach_their_value_and_stand_beside_the_paper(tmp_path: Path) -> None:
    (axes,) = bars_against_paper(tmp_path / "a.png", TABLE, xlabel="accuracy (%)", title="t").axes
    assert [patch.get_width() for patch in axes.patches] == [bar.value for bar in TABLE]
    assert [patch.get_facecolor() for patch in axes.patches[:3]] * 8 == [p.get_facecolor() for p in axes.patches]
    diamonds = [line for line in axes.lines if line.get_marker() == "D"]
    assert [line.get_xdata()[0] for line in diamonds] == [bar.paper for bar in TABLE if bar.paper]
    middles = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches]
    assert [line.get_ydata()[0] for line in diamonds] == pytest.approx(
        [y for y, bar in zip(middles, TABLE) if bar.paper]
    )
    shown = [text.get_text() for text in axes.texts]
    assert [text for text in shown if text in SETTINGS] == SETTINGS
    assert shown.count("96.0 ± 0.4") == shown.count("97") == len(SETTINGS)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [bar.system for bar in TABLE]


def test_bars_on_a_logarithmic_scale_start_below_the_least(tmp_path: Path) -> None:
    bars = [
        Bar(setting="s", system=str(value), value=value, paper=paper) for value, paper in ((25.33, 0.004), (0.0, 1))
    ]
    (axes,) = bars_against_paper(tmp_path / "a.png", bars, xlabel="KL (nats)", title="t", log=True).axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] == pytest.approx(0.001)
    assert [patch.get_x() + patch.get_width() for patch in axes.patches] == pytest.approx([25.33, 0.001])


def test_latents_keep_their_token_and_are_named_where_they_part(tmp_path: Path) -> None:
    figure = latent_maps(
        tmp_path / "a.png",
        [("VMD", RING, TOKENS), ("collapsed", RING[::-1] * 0, TOKENS)],
        title="t",
        label="first token",
    )
    parted, collapsed, bar = figure.axes
    (points,) = parted.collections
    drawn = {(*place, value) for place, value in zip(points.get_offsets().tolist(), points.get_array())}
    assert {(x, y, value) for (x, y), value in zip(map(tuple, RING.tolist()), TOKENS)} == {
        (place[0], place[1], value) for *place, value in drawn
    }
    for text in parted.texts:
        token = int(text.get_text())
        np.testing.assert_allclose(text.get_position(), (np.cos(token), np.sin(token)), atol=0.05)
    assert (len(parted.texts), len(collapsed.texts)) == (10, 0)
    assert len({to_hex(points.to_rgba(token)) for token in range(10)}) == 10
    assert (parted.get_xlim(), bar.get_ylabel()) == (collapsed.get_xlim(), "first token")


def test_many_values_are_a_scale_without_names(tmp_path: Path) -> None:
    figure = latent_maps(tmp_path / "a.png", [("z", RING, np.arange(300) / 3)], title="t", label="bin")
    assert not figure.axes[0].texts
    assert figure.axes[0].collections[0].get_clim() == (0, 299 / 3)


def test_correlations_are_written_out_where_they_belong(tmp_path: Path) -> None:
    matrix = np.array([[0.25, -1.0, 0.0], [0.5, 0.125, 0.75]])
    (axes,) = correlation(tmp_path / "a.png", matrix, ["z1", "z2"], ["x1", "x2", "x3"], title="t").axes
    for text in axes.texts:
        column, row = (int(place) for place in text.get_position())
        assert float(text.get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(matrix[row, column], abs=0.0051)
    assert axes.images[0].get_clim() == (-1, 1)


def test_bad_input_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"figures are PNG files: end .*a.jpg in .png"):
        DRAW["heatmaps"](tmp_path / "a.jpg")
    for path in (tmp_path / "folder.png", tmp_path / "file" / "a.png"):
        with pytest.raises(ValueError, match=r"can not be written .*: choose another place"):
            DRAW["lines"](path)
    with pytest.raises(ValueError, match="'VMD' has a number that is not finite: measure it again"):
        lines(tmp_path / "a.png", [1], {"VMD": ([np.nan], None)}, xlabel="x", ylabel="y", title="t")
    bars = [Bar(setting="D1", system="MDM", value=1.0, error=np.inf)]
    with pytest.raises(ValueError, match="'D1, MDM' has a number that is not finite"):
        bars_against_paper(tmp_path / "a.png", bars, xlabel="x", title="t")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.png"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'penumbra-diffusion\[figures\]'"):
        DRAW["lines"](tmp_path / "a.png")


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, tools.reproduce.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
