"""`penumbra watch` prints what the files of a run say, as far as they are there."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launchers.sparkline import DOTS, bar, curve, resample
from launchers.watch import Frame, compact, duration, milliseconds, read_frame, render, run_watch, shares
from pretrain.config import RunConfig
from pretrain.train import train

MakeConfig = Callable[..., RunConfig]
NOW = 1_800_000_000.0


def shown(frame: Frame, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(frame, width))
    text = capture.get()
    assert all(len(line) <= width for line in text.splitlines())
    return text


def write_run(folder: Path, *, events: list[dict[str, object]] | None = None, age: float = 0.0) -> Path:
    """A run of 100 steps of which 40 are done, in two ranks, the second of which is the slow one."""
    (folder / "spans").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: written\ntrain: {steps: 100}\n")
    lines: list[dict[str, object]] = [{"kind": "event", "event": "start", "step": 0}]
    for step in (10, 20, 30, 40):
        numbers = {"loss": 5.0 - step / 20, "tokens_per_second": 2000.0, "mfu": 0.37, "tokens": step * 1024}
        rest = {"lr": 1e-3, "grad_norm": 1.5, "skipped": step // 20}
        lines.append({"kind": "train", "step": step, **numbers, **rest})
    lines.append({"kind": "validation", "step": 40, "bound": "nelbo", "nelbo": 3.25, "nelbo_error": 0.1})
    lines += events or []
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rank, (compute, wait) in enumerate(((0.2, 0.5), (0.6, 0.1))):
        spans = {"forward": 4 * compute, "backward": 6 * compute, "rank_wait": 10 * wait, "data_wait": 0.5, "save": 1.0}
        line = {"steps": 10, "seconds": 10.0, "time": NOW - 3, "peak_memory": (rank + 1) * 2**30, **spans}
        text = "".join(json.dumps({"step": step, **line}) + "\n" for step in (10, 20, 30, 40))
        (folder / "spans" / f"rank-{rank}.jsonl").write_text(text)
    checkpoint = folder / "checkpoints" / "step-00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    os.utime(checkpoint / "manifest.json", (NOW - 187, NOW - 187))
    os.utime(metrics, (NOW - age, NOW - age))
    return folder


def test_a_frame_says_what_the_files_say(tmp_path: Path) -> None:
    text = shown(read_frame(write_run(tmp_path / "run"), NOW))
    for part in (
        "written  ● training",
        "40 of 100 steps   40%",
        "speed 2k tok/s   mfu 37%   left 1:00 min",  # 60 steps of a second each
        "loss  3.0000",
        "nelbo  3.2500",
        "step-00000030, 3:07 min ago",
        "skipped steps  2",
    ):
        assert part in text, part


def test_the_rank_that_others_wait_for_comes_first(tmp_path: Path) -> None:
    text = shown(read_frame(write_run(tmp_path / "run"), NOW))
    slow, fast = (line.split() for line in text.splitlines() if "GiB" in line and "ago" in line)
    values = ["1", "40", "50.0", "ms", "600.0", "ms", "100.0", "ms", "400.0", "ms", "2.00", "GiB", "3", "s", "ago"]
    assert slow[1:-1] == values
    assert " ".join(fast[1:-1]).startswith("0 40 50.0 ms 200.0 ms 500.0 ms 0.0 ms 1.00 GiB")


def test_shares_of_the_time_add_up_to_all_of_it() -> None:
    lines = [{"seconds": 4.0, "save": 1.0, "reduce": 0.5}, {"seconds": 4.0, "save": 3.0}]
    found = shares(lines)
    assert list(found)[:3] == ["save", "other", "reduce"]
    assert (found["save"], found["other"], found["reduce"]) == (0.5, 0.4375, 0.0625)


STOP = {"kind": "event", "event": "stop", "step": 40, "reason": "SIGTERM"}
RESUME = {"kind": "event", "event": "resume", "step": 40}
ROLLBACK = {"kind": "event", "event": "rollback", "step": 20, "spike": 44}


@pytest.mark.parametrize(
    ("events", "age", "parts"),
    [
        ([], 500.0, ("● silent for 8:20 min",)),
        ([{"kind": "event", "event": "finish", "step": 40}], 500.0, ("● finished",)),
        ([STOP], 500.0, ("● stopped: SIGTERM", "0 times, after 1 stops", "still to train 1:00 min")),
        ([STOP, RESUME], 0.0, ("● training", "1 times, after 1 stops")),
        ([ROLLBACK], 0.0, ("● training", "rollbacks      1", "20 of 100 steps")),
    ],
)
def test_its_state_is_what_happened_last(
    tmp_path: Path, events: list[dict[str, object]], age: float, parts: tuple[str, ...]
) -> None:
    text = shown(read_frame(write_run(tmp_path / "run", events=events, age=age), NOW))
    for part in parts:
        assert part in text, part


def test_stacks_of_the_watchdog_are_named_until_it_runs_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    stack = run / "stalls" / "rank-1-now.txt"
    stack.parent.mkdir()
    stack.touch()
    os.utime(stack, (NOW, NOW))
    assert f"stalled, see {stack}" in read_frame(run, NOW).status[0]
    os.utime(run / "config.yaml", (NOW + 1, NOW + 1))
    assert read_frame(run, NOW).status[0] == "training"


def test_a_run_that_has_written_nothing_yet_has_a_frame(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: young\ntrain: {steps: 100}\n")
    text = shown(read_frame(tmp_path, time.time()))
    assert "young  ● starting" in text
    assert text.count("nothing yet") == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder \(it has no config.yaml\): pass one such as runs/demo"):
        read_frame(tmp_path, NOW)


def test_a_finished_run_is_shown_once_and_left(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(tmp_path / "run", "train.steps=4"))
    capsys.readouterr()
    run_watch(tmp_path / "run", every=0.1, once=False)
    text = capsys.readouterr().out
    assert "small  ● finished" in text
    assert "4 of 4 steps" in text


@pytest.mark.parametrize("count", [1, 5, 24, 200])
def test_a_curve_passes_through_its_values(count: int) -> None:
    values = [(number * 7 % 11) / 10 for number in range(count)]
    rows = curve(values, 12, 3, 0.0, 1.0)
    assert [len(row) for row in rows] == [12] * 3
    dots = {
        (4 * y + r, 2 * x + c)
        for y, row in enumerate(rows)
        for x, character in enumerate(row)
        for r in range(4)
        for c in range(2)
        if ord(character) - 0x2800 & DOTS[r][c]
    }
    for column, value in enumerate(resample(values, 24)):
        heights = sorted(row for row, c in dots if c == column)
        assert round((1 - value) * 11) in heights
        assert heights == list(range(heights[0], heights[-1] + 1)), "no gap in a column"


def test_many_values_are_averaged_and_few_are_connected() -> None:
    assert resample([1, 3, 5, 7], 2) == [2, 6]
    assert resample([0, 1], 5) == [0, 0.25, 0.5, 0.75, 1]
    assert sum(resample(list(range(97)), 10)) / 10 == pytest.approx(48, abs=1)
    assert resample([], 3) == []


def test_bars_and_numbers_are_short() -> None:
    assert [bar(share, 4) for share in (0.0, 0.5, 0.53125, 1.0, 7.0)] == ["    ", "██  ", "██▏ ", "████", "████"]
    assert [duration(s) for s in (42.4, 187, 18_240, 183_600)] == ["42 s", "3:07 min", "5:04 h", "2 d 3 h"]
    assert [compact(n) for n in (950, 19_640, 3.07e6, 6.5e10)] == ["950", "19.6k", "3.07M", "65B"]
    assert [milliseconds(s) for s in (0.0123, 2.5)] == ["12.3 ms", "2.50 s"]
