"""Programming tasks in HumanEval's format: one JSON object a line."""

import gzip
import json
import zlib
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Task:
    """A function to complete: `test` defines `check(candidate)`, which raises if the candidate is wrong."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def program(self, completion: str) -> str:
        """The program that ends without an exception exactly if the completion passes."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def read_tasks(path: str | Path) -> list[Task]:
    """Reads `.jsonl` or `.jsonl.gz`; keys besides those of `Task` are ignored.

    Raises ValueError with file and line for a file, line or key that is missing or not as it should be.
    """
    tasks: dict[str, Task] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        if line.strip():
            task = _parse(line, f"{path}:{number}")
            if task.task_id in tasks:
                raise ValueError(f"{path}:{number}: task_id {task.task_id!r} occurs twice; make it unique")
            tasks[task.task_id] = task
    if not tasks:
        raise ValueError(f"{path} has no tasks; it must have one JSON object a line")
    return list(tasks.values())


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        message = f"cannot read tasks from {path}: {error}; give a .jsonl or .jsonl.gz file"
        raise ValueError(message) from error


def _parse(line: str, place: str) -> Task:
    names = [field.name for field in fields(Task)]
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: must be a JSON object with the keys {', '.join(names)}")
    for name in names:
        if not isinstance(record.get(name), str):
            wrong = "is not a string" if name in record else "is missing"
            raise ValueError(f"{place}: key {name!r} {wrong}; a task has the text keys {', '.join(names)}")
    return Task(**{name: record[name] for name in names})
