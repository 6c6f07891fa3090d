import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.charts import chart, short, smoothed, thinned, ticks
from eval.report import read_metrics, write_report

HOSTILE = "</script><b>&amp;\ud800"
FRAMES = [
    [["def", "prompt"], ["<|mask|>", "masked"], ["<|mask|>", "masked"]],
    [["def", "prompt"], [HOSTILE, "new"], ["<|mask|>", "masked"]],
    [["def", "prompt"], [HOSTILE, "known"], ["\n    x", "new"]],
]


class Page(HTMLParser):
    """The elements, the ids and the text of a page as a browser's parser sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.text = ""
        self._script: str | None = None
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self._script = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[self._script] = data
        elif self._inside != "style":
            self.text += data

    def count(self, tag: str, css: str) -> int:
        return sum(1 for name, attrs in self.tags if name == tag and attrs.get("class") == css)


def train_row(step: int, loss: float) -> dict[str, object]:
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 3e-4,
        "tokens": step * 2048,
        "tokens_per_second": 21000.0,
        "mfu": None,
    }


def write_metrics(run: Path) -> None:
    start = {"versions": {"torch": "2.13.0"}, "machine": {"cpu": HOSTILE}, "commit": "3f2a1c0"}
    rows = [
        {
            "kind": "event",
            "event": "start",
            "step": 0,
            "time": "2026-09-14T10:02:11",
            "parameters": 4731904,
            **start,
        },
        *(train_row(step, 9.0) for step in range(1, 8)),
        {"kind": "validation", "step": 7, "bound": "nelbo", "nelbo": 8.0, "nelbo_error": 0.1},
        {"kind": "event", "event": "resume", "step": 4, "time": "2026-09-14T10:04:00", **start},
        *(train_row(step, 5.0) for step in (4, 5)),
        {"kind": "validation", "step": 5, "nelbo": 4.5, "nelbo_error": 0.1},
    ]
    lines = [json.dumps(row) for row in rows]
    lines.insert(8, '{"kind": "train", "step": 8, "lo')
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "train", "st']))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "night"
    (run / "evaluations").mkdir(parents=True)
    (run / "samples").mkdir()
    (run / "config.yaml").write_text("optim:\n  lr: 0.0003\n  note: '<b>'\n")
    write_metrics(run)
    bound = {"command": "penumbra eval", "results": {"bound.nelbo": 2.25, "bound.nelbo_error": 0.02}}
    (run / "evaluations" / "bound.json").write_text(json.dumps(bound))
    (run / "evaluations" / "demo_tasks.json").write_text(json.dumps({"results": {"demo_tasks.pass_at_1": 0.125}}))
    samples = {"settings": {}, "samples": [{"text": "def", "frames": FRAMES}, {"text": "plain text"}]}
    (run / "samples" / "ancestral.json").write_text(json.dumps(samples))
    return run


def test_page_shows_the_measurements(run: Path) -> None:
    text = Page(write_report(run)).text
    perplexity = f"perplexity at most {math.exp(2.25):.4g}"
    for expected in ("night", "2.250", perplexity, "0.125", "21k", "4.73M", "once", "2.25 \u00b1 0.02"):
        assert expected in text
    for expected in ("lr: 0.0003", "note: '<b>'", "2.13.0", "3f2a1c0", "not finished"):
        assert expected in text


def test_page_loads_nothing_from_outside(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    loading = {attrs[name] for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs}
    assert loading == set()
    assert "//" not in path.read_text(encoding="utf-8")
    assert {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object"} == set()


def test_frames_survive_hostile_tokens(run: Path) -> None:
    page = Page(write_report(run))
    first, second = json.loads(page.scripts["samples"])
    states = ("prompt", "masked", "new", "known")
    unpacked = [
        [[first["texts"][token], states[int(state)]] for token, state in zip(frame["tokens"], frame["states"])]
        for frame in first["frames"]
    ]
    assert unpacked == FRAMES
    assert [len(sample["frames"]) for sample in (first, second)] == [3, 1]
    assert second["texts"] == ["plain text"]
    assert "</script><b>&amp;?" in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert [tag for tag, attrs in page.tags if tag == "b" and not attrs] == []


def test_charts_hold_the_later_life_of_a_resumed_run(run: Path) -> None:
    train, validation, events = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in train] == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 5.0), (5, 5.0)]
    assert [row["step"] for row in validation] == [5]
    assert [row["event"] for row in events] == ["start", "resume"]
    page = Page(write_report(run))
    assert page.count("path", "smooth") == 4
    assert page.count("path", "resume") == 4
    assert page.count("path", "point") == page.count("path", "error") == 1


@pytest.mark.parametrize(
    ("kind", "name", "is_bound"),
    [
        ("nelbo", "bound", True),
        ("nelbo_steps[4]", "bound", True),
        ("delbo", "delbo (not a bound)", False),
        ("nll_discrete", "discrete part (not a bound)", False),
    ],
)
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_value_is_called_what_it_is(run: Path, kind: str, name: str, is_bound: bool, evaluated: bool) -> None:
    row = {"kind": "validation", "step": 6, "bound": kind, kind: 3.25, f"{kind}_error": 0.125}
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    results = {f"bound.{kind}": 3.25, f"bound.{kind}_error": 0.1, "bound.tokens": 9} if evaluated else {}
    (run / "evaluations" / "bound.json").write_text(json.dumps({"results": results}))
    page = Page(write_report(run))
    assert f"{name}, nats per token3.250" in page.text.replace("\n", "")
    assert ("perplexity at most" in page.text) == is_bound
    assert ("Loss and bound" if is_bound else "Loss and validation") in page.text
    assert f"validation: {name}, and its error" in page.text
    assert page.count("path", "point") == 2
    assert "step 6: 3.2500 +- 0.1250" in page.text


def test_a_bound_comes_before_what_is_none(run: Path) -> None:
    results = {"bound.delbo": 1.5, "bound.delbo_error": 0.1, "bound.nelbo_kept": 2.5}
    (run / "evaluations" / "bound.json").write_text(json.dumps({"results": results}))
    text = Page(write_report(run)).text.replace("\n", "")
    assert "bound, nats per token2.500" in text
    assert "1.5 \u00b1 0.1" in text


def test_what_latents_say_is_drawn_where_there_are_any(run: Path) -> None:
    assert "What the latent says" not in Page(write_report(run)).text
    rows = [
        {**train_row(step, 5.0), "kl": 0.5 * step, "active_units": step, "mutual_information": 0.4 * step}
        for step in range(6, 9)
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, rows)))
    page = Page(write_report(run))
    assert page.count("path", "smooth") == 4 + 3
    for label in ("What the latent says", "KL to the prior", "active units", "mutual information"):
        assert label in page.text


def test_missing_parts_name_their_command(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = Page(write_report(tmp_path)).text
    for command in (
        "penumbra train RECIPE",
        f"penumbra sample {tmp_path}",
        f"penumbra eval {tmp_path} --task bound",
    ):
        assert command in text


def test_out_is_written_whole_or_not_at_all(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert write_report(run, out) == out
    assert out.read_text(encoding="utf-8").endswith("</html>")
    with pytest.raises(ValueError, match="can not be written"):
        write_report(run, out / "page.html")
    (tmp_path / "folder" / "kept").mkdir(parents=True)
    with pytest.raises(ValueError, match="can not be written"):
        write_report(run, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "night", "page.html"]


def test_unreadable_input_is_one_sentence(run: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(run / "config.yaml")
    (run / "evaluations" / "bound.json").write_text('{"results": ')
    with pytest.raises(ValueError, match=r"bound\.json is not JSON"):
        write_report(run)
    (run / "evaluations" / "bound.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        write_report(run)
    for results in ("3", "[1]", '{"bound.nelbo": "low"}', '{"bound.nelbo": null}'):
        (run / "evaluations" / "bound.json").write_text(f'{{"results": {results}}}')
        with pytest.raises(ValueError, match=r"bound\.json has results that are not numbers by key"):
            write_report(run)
    (run / "evaluations" / "bound.json").unlink()
    (run / "samples" / "ancestral.json").write_text('{"samples": [1]}')
    with pytest.raises(ValueError, match=r"ancestral\.json has samples that are not JSON objects"):
        write_report(run)


def test_a_folder_that_is_no_run_gets_no_page(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match=r"is not a run folder \(it has neither"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_chart_survives_values_that_are_not_finite() -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"step": 3}]
    assert chart(rows, "loss", resumes=[]) is None
    drawing = chart([*rows, {"step": 4, "loss": 2.0}], "loss", resumes=[])
    assert drawing is not None
    assert drawing.smooth == "M1000.0,500.0h0"


def test_chart_places_extremes_inside_the_box() -> None:
    rows = [{"step": step, "loss": 10.0 - step} for step in range(1, 5)]
    drawing = chart(rows, "loss", resumes=[2], validation=[{"step": 4, "value": 5.0, "error": 0.5}])
    assert drawing is not None
    corners = [tuple(map(float, corner.split(","))) for corner in drawing.smooth[1:].split("L")]
    assert [x for x, _ in corners] == [250.0, 500.0, 750.0, 1000.0]
    assert all(0 < y < 1000 for _, y in corners)
    assert corners == sorted(corners)
    assert drawing.marks == [500.0]
    (point,) = drawing.points
    assert point["top"] < point["y"] < point["bottom"] <= 1000


def test_smoothing_is_a_centred_mean() -> None:
    values = np.sin(np.arange(400.0))
    expected = [values[i - reach : i + reach + 1].mean() for i in range(400) for reach in [min(5, i, 399 - i)]]
    np.testing.assert_allclose(smoothed(values), expected, atol=1e-12)


def test_thinning_keeps_spikes_and_order() -> None:
    values = np.zeros(100_000)
    values[[31_415, 92_653]] = [7.0, -7.0]
    steps, kept = thinned(np.arange(100_000.0), values)
    assert len(kept) <= 1000
    assert (kept.max(), kept.min()) == (7.0, -7.0)
    assert np.all(np.diff(steps) > 0)


@pytest.mark.parametrize(("low", "high"), [(0, 900), (1.97, 10.3), (0, 3.1e-4), (-0.2, 0.2), (4.999, 5.001)])
def test_ticks_are_few_even_and_inside(low: float, high: float) -> None:
    places = ticks(low, high)
    assert 2 <= len(places) <= 7
    assert all(low <= place <= high for place in places)
    np.testing.assert_allclose(np.diff(places), places[1] - places[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.5, "2.5"),
        (5000, "5000"),
        (21_300, "21.3k"),
        (7.6e9, "7.6B"),
        (3e-4, "3e-4"),
        (2.5e-5, "2.5e-5"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
