"""`penumbra watch`: a run as it is now, out of the files that it writes; it may run anywhere that sees its folder."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eval.report import Row, read_metrics
from pretrain.checkpoint.load import CHECKPOINTS
from pretrain.hooks.spans import DEVICE_PHASES, HOST_PHASES, read_spans

from .sparkline import bar, curve

RECENT = 20
"""Lines that speed, time left and shares are taken from."""
SILENT = 120.0
"""Seconds without a line, and ten times the usual distance of lines, after which a run counts as silent."""
MOST_RANKS = 8
CHART_HEIGHT = 5
HIGHEST = 0.97
"""Share of the values that a chart's scale covers: the first steps would flatten all others."""
LABELS = {
    "forward": "forward",
    "backward": "backward",
    "reduce": "reducing, norm, clip",
    "optimizer": "optimizer",
    "data_wait": "waiting for data",
    "rank_wait": "waiting for ranks",
    "log": "logging",
    "validation": "validation",
    "save": "saving",
    "other": "everything else",
}
COLOURS = {
    "data_wait": "yellow",
    "rank_wait": "yellow",
    "validation": "magenta",
    "save": "blue",
    "other": "bright_black",
}


@dataclass(frozen=True)
class Frame:
    """What the files of a run say at one moment.

    Args:
        name, steps: from its configuration.
        train, validation, events: lines of metrics.jsonl, in order.
        spans: recent lines by rank.
        checkpoint: name and age in seconds of the newest sealed one.
        age: seconds since the last line.
        stalls: stacks that the watchdog has written since the run was last started.
    """

    name: str
    steps: int
    train: list[Row]
    validation: list[Row]
    events: list[Row]
    spans: dict[int, list[Row]]
    checkpoint: tuple[str, float] | None
    age: float
    stalls: list[Path]
    now: float

    @property
    def step(self) -> int:
        """The newest step that a line tells of."""
        return max((row["step"] for row in (*self.train[-1:], *self.events[-1:])), default=0)

    @property
    def seconds_per_step(self) -> float | None:
        """Wall time of a step lately, with validations and saves."""
        lines = [line for line in self.spans.get(0, []) if line["steps"] > 0]
        steps = sum(line["steps"] for line in lines)
        return sum(line["seconds"] for line in lines) / steps if steps else None

    @property
    def status(self) -> tuple[str, str]:
        """How it stands, and in which colour."""
        last = self.events[-1] if self.events else {}
        if last.get("event") == "finish":
            return "finished", "green"
        if last.get("event") == "stop":
            return f"stopped: {last.get('reason')}", "yellow"
        if self.stalls:
            return f"stalled, see {self.stalls[-1]}", "red"
        usual = (self.seconds_per_step or 0.0) * max((line["steps"] for line in self.spans.get(0, [])), default=1)
        if self.age > max(SILENT, 10 * usual):
            return f"silent for {duration(self.age)}", "red"
        return ("training", "green") if self.train else ("starting", "yellow")


def run_watch(run: Path, *, every: float, once: bool) -> None:
    """Shows a run until it has finished, or one frame of it."""
    console = Console(highlight=False)
    if once:
        console.print(render(read_frame(run, time.time()), console.width))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while (frame := read_frame(run, time.time())).status[0] != "finished":
                live.update(render(frame, console.width), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        pass
    console.print(render(read_frame(run, time.time()), console.width))


def read_frame(run: Path, now: float) -> Frame:
    """Reads a run's folder.

    Raises:
        ValueError: it is none.
    """
    metrics, settings = run / "metrics.jsonl", run / "config.yaml"
    if not settings.is_file():
        raise ValueError(f"{run} is not a run folder (it has no config.yaml): pass one such as runs/demo")
    config = yaml.safe_load(settings.read_text())
    train, validation, events = read_metrics(metrics)
    checkpoints = sorted(
        path for path in (run / CHECKPOINTS).glob("step-*/manifest.json") if path.parent.suffix != ".tmp"
    )
    return Frame(
        name=config["name"],
        steps=config["train"]["steps"],
        train=train,
        validation=validation,
        events=events,
        spans={rank: lines[-RECENT:] for rank, lines in read_spans(run / "spans").items() if lines},
        checkpoint=(checkpoints[-1].parent.name, now - checkpoints[-1].stat().st_mtime) if checkpoints else None,
        age=now - (metrics if metrics.exists() else settings).stat().st_mtime,
        stalls=sorted(p for p in run.glob("stalls/*.txt") if p.stat().st_mtime > settings.stat().st_mtime),
        now=now,
    )


def render(frame: Frame, width: int) -> RenderableType:
    """One frame: progress, curves, where the time goes, what was survived, and the ranks where there are several."""
    half = width // 2
    loss = [(row["step"], row["loss"]) for row in frame.train]
    bound = [(row["step"], row["value"]) for row in frame.validation if row["value"] is not None]
    kind = frame.validation[-1]["kind"] if bound else "bound"
    parts: list[RenderableType] = [
        _progress(frame, width),
        Columns([_chart("loss", loss, half, "cyan"), _chart(kind, bound, width - half, "green")], padding=0),
        Columns([_phases(frame, half), _survival(frame, width - half)], padding=0),
    ]
    if len(frame.spans) > 1:
        parts.append(_ranks(frame, width))
    return Group(*parts)


def _panel(content: RenderableType, title: str | Text, width: int, height: int | None = None) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="bright_black", width=width, height=height)


def _progress(frame: Frame, width: int) -> Panel:
    status, colour = frame.status
    title = Text.assemble((frame.name, "bold"), "  ", (f"● {status}", colour))
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    line.add_column(ratio=1)
    line.add_column(justify="right")
    done = Text.assemble((f"{frame.step:,}", "bold"), f" of {frame.steps:,} steps  {frame.step / frame.steps:4.0%}")
    line.add_row(ProgressBar(frame.steps, frame.step, complete_style=colour, finished_style=colour), done)
    return _panel(Group(line, _facts(_speed(frame))), title, width)


def _speed(frame: Frame) -> list[tuple[str, str]]:
    if not frame.train:
        return []
    recent, last = frame.train[-RECENT:], frame.train[-1]
    facts = [("speed", f"{compact(fmean(row['tokens_per_second'] for row in recent))} tok/s")]
    if last.get("mfu") is not None:
        facts.append(("mfu", f"{fmean(row.get('mfu') or 0.0 for row in recent):.0%}"))
    if frame.seconds_per_step is not None and frame.step < frame.steps:
        label = "left" if frame.status[0] == "training" else "still to train"
        facts.append((label, duration((frame.steps - frame.step) * frame.seconds_per_step)))
    facts += [
        ("tokens", compact(last["tokens"])),
        ("lr", f"{last['lr']:.2e}"),
        ("gradient", f"{last['grad_norm']:.2f}"),
    ]
    return facts


def _facts(facts: list[tuple[str, str]]) -> Text:
    return Text("   ").join(Text.assemble((f"{name} ", "bright_black"), value) for name, value in facts)


def _chart(name: str, points: list[tuple[int, float]], width: int, colour: str) -> Panel:
    values = [value for _, value in points]
    if not values:
        return _panel(Text("nothing yet", "bright_black"), name, width, CHART_HEIGHT + 3)
    low, high = min(values), sorted(values)[round(HIGHEST * (len(values) - 1))]
    labels = [f"{high:.3g}", f"{low:.3g}"]
    margin = max(map(len, labels)) + 1
    rows = curve(values, width - 4 - margin, CHART_HEIGHT, low, high)
    sides = [labels[0], *[""] * (CHART_HEIGHT - 2), labels[1]]
    lines = [
        Text.assemble((side.rjust(margin - 1) + " ", "bright_black"), (row, colour)) for side, row in zip(sides, rows)
    ]
    first, last = f"step {points[0][0]:,}", f"{points[-1][0]:,}"
    axis = Text(" " * margin + first + last.rjust(width - 4 - margin - len(first)), "bright_black")
    return _panel(Group(*lines, axis), Text.assemble(name, "  ", (f"{values[-1]:.4f}", f"bold {colour}")), width)


def shares(lines: list[Row]) -> dict[str, float]:
    """Share of a rank's time by phase, the largest first."""
    total = sum(line["seconds"] for line in lines) or 1.0
    found = {phase: sum(line.get(phase, 0.0) for line in lines) / total for phase in DEVICE_PHASES + HOST_PHASES}
    found["other"] = max(0.0, 1.0 - sum(found.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _phases(frame: Frame, width: int) -> Panel:
    table = Table.grid(padding=(0, 1, 0, 0))
    for phase, share in list(shares(frame.spans.get(0, [])).items())[:6] if frame.spans else ():
        length = width - 4 - 19 - 7
        table.add_row(LABELS[phase], Text(bar(share, length), COLOURS.get(phase, "cyan")), f"{share:4.0%}")
    return _panel(table, "where the time goes", width, 8)


def _survival(frame: Frame, width: int) -> Panel:
    count = {name: sum(e.get("event") == name for e in frame.events) for name in ("resume", "rollback", "stop")}
    skipped = frame.train[-1]["skipped"] if frame.train else 0
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bright_black")
    saved = "none yet" if frame.checkpoint is None else f"{frame.checkpoint[0]}, {duration(frame.checkpoint[1])} ago"
    table.add_row("checkpoint", saved)
    table.add_row("last line", f"{duration(frame.age)} ago")
    table.add_row("resumed", f"{count['resume']} times, after {count['stop']} stops")
    table.add_row("skipped steps", Text(f"{skipped}", "yellow" if skipped else ""))
    table.add_row("rollbacks", Text(f"{count['rollback']}", "yellow" if count["rollback"] else ""))
    memory = max((lines[-1]["peak_memory"] for lines in frame.spans.values()), default=0)
    table.add_row("peak memory", f"{memory / 2**30:.2f} GiB a rank")
    return _panel(table, "what it lived through", width, 8)


def _ranks(frame: Frame, width: int) -> Panel:
    """The slowest first: the least time waiting for others is the most time that others wait."""
    per_step = {rank: _per_step(lines) for rank, lines in frame.spans.items()}
    longest = max(times["rank_wait"] for times in per_step.values())
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    for header in ("rank", "step", "waits for data", "computes", "waits for ranks", "lag", "memory", "last line"):
        table.add_column(header, justify="right")
    slowest = sorted(per_step, key=lambda rank: (frame.spans[rank][-1]["step"], per_step[rank]["rank_wait"]))
    for rank in slowest[:MOST_RANKS]:
        times, last = per_step[rank], frame.spans[rank][-1]
        lag = longest - times["rank_wait"]
        table.add_row(
            str(rank),
            f"{last['step']:,}",
            milliseconds(times["data_wait"]),
            milliseconds(sum(times[phase] for phase in DEVICE_PHASES)),
            milliseconds(times["rank_wait"]),
            Text(milliseconds(lag), "yellow" if lag > 0.1 * times["seconds"] else ""),
            f"{last['peak_memory'] / 2**30:.2f} GiB",
            f"{duration(frame.now - last['time'])} ago",
        )
    more = len(slowest) - MOST_RANKS
    title = f"ranks, time per step{f', the slowest {MOST_RANKS} of {len(slowest)}' if more > 0 else ''}"
    return _panel(table, title, width)


def _per_step(lines: list[Row]) -> dict[str, float]:
    steps = max(1, sum(line["steps"] for line in lines))
    names = ("seconds", *DEVICE_PHASES, *HOST_PHASES)
    return {name: sum(line.get(name, 0.0) for line in lines) / steps for name in names}


def milliseconds(seconds: float) -> str:
    """Short times in ms, long ones in s."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def duration(seconds: float) -> str:
    """42 s, 3:07 min, 5:04 h, 2 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def compact(number: float) -> str:
    """3 digits and a unit: 19.6k, 3.07M, 65B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
