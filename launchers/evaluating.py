"""`penumbra eval`: runs one task, prints it, and keeps the record beside the run."""

from dataclasses import asdict, replace
from pathlib import Path

from eval.record import Record
from eval.tasks import EvaluationSettings, open_run, run_task, task_name
from pretrain.writable import check_writable


def run_evaluation(folder: Path, task: str, settings: EvaluationSettings, json_file: Path | None) -> None:
    """Scores a run; writes RUN/evaluations/TASK.json and, where asked, another copy."""
    run = open_run(folder)
    kept = run.loaded.run / "evaluations" / f"{task_name(task)}.json"
    check_writable(kept, json_file)
    settings = replace(settings, sampling=settings.sampling.for_model(run.loaded.model.config))
    record = Record({"run": str(folder), "task": task, "checkpoint": run.loaded.checkpoint.name, **asdict(settings)})
    results = run_task(task, run, settings, print)
    record.write(results, kept, json_file)
    print(f"written to {kept}" + (f" and {json_file}" if json_file else ""))
