"""Scores generated code by running it: tasks, sandbox, pass@k, and a baseline that copies."""

from eval.code.nearest import NearestExample
from eval.code.pass_at_k import CodeScore, evaluate, pass_at_k, score
from eval.code.sandbox import Limits, Outcome, require_sandbox, run_many, run_program
from eval.code.tasks import Task, read_tasks

__all__ = [
    "CodeScore",
    "Limits",
    "NearestExample",
    "Outcome",
    "Task",
    "evaluate",
    "pass_at_k",
    "read_tasks",
    "require_sandbox",
    "run_many",
    "run_program",
    "score",
]
