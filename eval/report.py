"""The run report: one self-contained HTML page that shows what a run did."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from eval.charts import Row, chart, finite, short
from eval.record import write_whole
from pretrain.hooks.metrics import read_metrics as metric_lines

SAMPLES_SHOWN = 6
STATES = ("prompt", "masked", "new", "known")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder holds, as far as it has been filled; a missing part is empty."""

    folder: Path
    config: str
    train: list[Row]
    validation: list[Row]
    events: list[Row]
    evaluations: dict[str, Row]
    samples: list[Row]

    @property
    def resumes(self) -> list[int]:
        """Steps at which the run was resumed."""
        return [row["step"] for row in self.events if row.get("event") == "resume"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the numbers at the top of the page."""

    label: str
    value: str
    note: str = ""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of the run folder `run` to `out` (default: RUN/report.html) and returns its path.

    The page loads nothing from outside. Parts of the folder that do not exist yet are named on the page
    together with the command that makes them. Raises ValueError for a folder or a file it cannot read.
    """
    if not any((run / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ValueError(
            f"{run} is not a run folder (it has neither config.yaml nor metrics.jsonl): "
            "name the folder that `penumbra train` wrote, such as runs/demo"
        )
    page = render(read_run(run))
    target = out or run / "report.html"
    write_whole(target, page.encode(errors="replace").decode())
    return target


def read_run(run: Path) -> RunRecord:
    """Reads config.yaml, metrics.jsonl, evaluations/*.json and samples/*.json of a run folder."""
    train, validation, events = read_metrics(run / "metrics.jsonl")
    return RunRecord(
        folder=run,
        config=_read_text(run / "config.yaml"),
        train=train,
        validation=validation,
        events=events,
        evaluations={path.stem: _read_evaluation(path) for path in sorted(run.glob("evaluations/*.json"))},
        samples=[
            {"name": f"{path.stem} {number}", **sample}
            for path in sorted(run.glob("samples/*.json"))
            for number, sample in enumerate(_read_samples(path), start=1)
        ],
    )


def read_metrics(path: Path) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and event rows in order of their step; lines cut short by a kill are left out.

    A resume or a rollback goes back to its step: rows past it are forgotten; of two rows of one step the later counts.
    """
    train: dict[int, Row] = {}
    validation: dict[int, Row] = {}
    events: list[Row] = []
    for row in metric_lines(path) if path.is_file() else ():
        if not isinstance(row.get("step"), int):
            continue
        step, kind = row["step"], row.get("kind")
        if kind == "train":
            train[step] = row
        elif kind == "validation":
            validation[step] = _validation_row(row)
        elif kind == "event":
            events.append(row)
            if row.get("event") in ("resume", "rollback"):
                train = {s: kept for s, kept in train.items() if s <= step}
                validation = {s: kept for s, kept in validation.items() if s <= step}
    return [train[s] for s in sorted(train)], [validation[s] for s in sorted(validation)], events


def _validation_row(row: Row) -> Row:
    """Step, kind, value and error of a validation, whatever it measured."""
    kind = row.get("bound", "nelbo")
    return {"step": row["step"], "kind": kind, "value": row.get(kind), "error": row.get(f"{kind}_error") or 0.0}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): make it a readable file or remove it") from error


def _read_json(path: Path) -> Row:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it and run its command again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: remove it and run its command again")
    return content


def _read_evaluation(path: Path) -> Row:
    content = _read_json(path)
    results = content.get("results", {})
    if not isinstance(results, dict) or not all(isinstance(value, int | float) for value in results.values()):
        raise ValueError(f"{path} has results that are not numbers by key: remove it and run its command again")
    return content


def _read_samples(path: Path) -> list[Row]:
    samples = _read_json(path).get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise ValueError(f"{path} has samples that are not JSON objects: remove it and run its command again")
    return samples


def key_figures(record: RunRecord) -> list[Figure]:
    """The numbers a reader looks for first; those the run has not measured are left out."""
    figures = _bound_figure(record)
    for evaluation in record.evaluations.values():
        for key, value in evaluation.get("results", {}).items():
            if key.endswith(".pass_at_1"):
                figures.append(Figure(label="pass@1", value=f"{value:.3f}", note=key.removesuffix(".pass_at_1")))
    speeds, mfus = finite(record.train, "tokens_per_second"), finite(record.train, "mfu")
    if speeds:
        figures.append(Figure(label="tokens per second", value=short(median(speeds)), note="median"))
    if mfus:
        figures.append(Figure(label="MFU", value=f"{100 * median(mfus):.1f}%", note="median"))
    parameters = [row["parameters"] for row in record.events if row.get("parameters")]
    if parameters:
        figures.append(Figure(label="parameters", value=short(parameters[-1])))
    if record.train:
        last = record.train[-1]
        tokens = f"{short(last['tokens'])} tokens" if "tokens" in last else ""
        figures.append(Figure(label="steps", value=f"{last['step']:,}", note=tokens))
    count = len(record.resumes)
    if record.events:
        figures.append(Figure(label="resumed", value={0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")))
    return figures


def _bound_figure(record: RunRecord) -> list[Figure]:
    """The first bound of the evaluations, else the first value that is none, else the last validation's."""
    found = [
        (key.removeprefix("bound."), value)
        for evaluation in record.evaluations.values()
        for key, value in evaluation.get("results", {}).items()
        if key.startswith("bound.") and not key.endswith(("_error", ".tokens"))
    ]
    if not found:
        found = [(row["kind"], row["value"]) for row in record.validation[-1:] if finite([row], "value")]
    if not found:
        return []
    kind, value = next((pair for pair in found if bound_name(pair[0]) == "bound"), found[0])
    is_bound = bound_name(kind) == "bound" and value < 700
    note = f"perplexity at most {short(math.exp(value))}" if is_bound else ""
    return [Figure(label=f"{bound_name(kind)}, nats per token", value=f"{value:.3f}", note=note)]


def bound_name(kind: str) -> str:
    """What a reader may take a value for: only the relatives of `nelbo` bound -log p (docs/errata.md)."""
    others = {"delbo": "delbo (not a bound)", "nll_discrete": "discrete part (not a bound)"}
    return others.get(kind, "bound" if kind.startswith("nelbo") else f"{kind} (not a bound)")


def pack_sample(sample: Row) -> Row:
    """A sample for the page's player: the distinct token texts once, then per frame their numbers and states.

    A state is one digit, its index in `STATES`. A sample without frames becomes one frame of known text.
    """
    texts: dict[str, int] = {}
    frames = [
        {
            "tokens": [texts.setdefault(text, len(texts)) for text, _ in frame],
            "states": "".join(str(STATES.index(state)) for _, state in frame),
        }
        for frame in sample.get("frames") or [[[sample.get("text", ""), "known"]]]
    ]
    return {"name": sample["name"], "texts": list(texts), "frames": frames}


def measurements(results: Row) -> list[tuple[str, str]]:
    """Results as (key, value) texts, each value with its error where `KEY_error` is among the results."""
    table = []
    for key, value in results.items():
        if key.endswith("_error") and key.removesuffix("_error") in results:
            continue
        error = results.get(f"{key}_error")
        table.append((key, f"{value:,.6g}" + (f" \u00b1 {error:.2g}" if error is not None else "")))
    return table


def summary(events: list[Row]) -> str:
    """One sentence on when the run began and whether it is done."""
    if not events:
        return "A run that has recorded nothing yet."
    began = f"Began {_moment(events[0])}"
    ended = events[-1].get("event") == "finish"
    return f"{began}, finished {_moment(events[-1])}." if ended else f"{began}, not finished at this report."


def _moment(event: Row) -> str:
    return str(event.get("time", "at an unknown time"))[:16].replace("T", " ")


def origins(record: RunRecord) -> dict[str, Row]:
    """What the run ran on, by heading: of its last process, else of its first evaluation."""
    starts = [row for row in record.events if row.get("event") in ("start", "resume")]
    source = next(iter([*reversed(starts), *record.evaluations.values()]), {})
    groups = {name: source[name] for name in ("versions", "machine") if isinstance(source.get(name), dict)}
    code = {"commit": source["commit"]} if source.get("commit") else {}
    return {name: content for name, content in {**groups, "code": code}.items() if content}


def render(record: RunRecord) -> str:
    """The page of a run as HTML text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    rows, resumes = record.train, record.resumes
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report_template.html").render(
        record=record,
        title=record.folder.resolve().name,
        summary=summary(record.events),
        figures=key_figures(record),
        loss=chart(rows, "loss", resumes=resumes, validation=record.validation),
        speed=chart(rows, "tokens_per_second", resumes=resumes, floor=0.0),
        gradient=chart(rows, "grad_norm", resumes=resumes, floor=0.0),
        rate=chart(rows, "lr", resumes=resumes, floor=0.0),
        kl=chart(rows, "kl", resumes=resumes, floor=0.0),
        active_units=chart(rows, "active_units", resumes=resumes, floor=0.0),
        information=chart(rows, "mutual_information", resumes=resumes, floor=0.0),
        validated=bound_name(record.validation[-1]["kind"]) if record.validation else "bound",
        samples=[pack_sample(sample) for sample in record.samples[:SAMPLES_SHOWN]],
        states=STATES,
        measurements=measurements,
        origins=origins(record),
        recipe=f"{record.folder}/config.yaml" if record.config else "RECIPE",
    )
