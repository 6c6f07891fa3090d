"""pass@k: the chance that at least one of k samples is right (Chen et al. 2021, arXiv 2107.03374)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

from eval.code.sandbox import Limits, Outcome, require_sandbox, run_many
from eval.code.tasks import Task


@dataclass(frozen=True, kw_only=True)
class CodeScore:
    """`pass_at_k` by k, averaged over tasks, and each task's outcomes, one per completion."""

    pass_at_k: dict[int, float]
    outcomes: dict[str, list[Outcome]]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) from n samples of which c are correct.

    Raises ValueError unless 1 <= k <= num_samples and 0 <= num_correct <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be from 1 to the number of samples, {num_samples}; got {k}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be from 0 to {num_samples}, got {num_correct}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def score(outcomes: Mapping[str, Sequence[Outcome]], ks: Sequence[int]) -> dict[int, float]:
    """pass@k for each k, averaged over tasks."""
    if not outcomes:
        raise ValueError("there are no outcomes to score; give at least one task")
    return {
        k: sum(pass_at_k(len(task), _num_passed(task), k) for task in outcomes.values()) / len(outcomes) for k in ks
    }


def evaluate(
    tasks: Sequence[Task],
    completions: Mapping[str, Sequence[str]],
    *,
    limits: Limits,
    workers: int,
    ks: Sequence[int] = (1,),
) -> CodeScore:
    """Runs every completion of every task, in a process of its own, and scores them.

    `completions` maps a task_id to what follows its prompt. Raises ValueError for a task without completions
    or with fewer than the largest k, and where programs can not be run.
    """
    needed = max((1, *ks))
    for task in tasks:
        if len(completions.get(task.task_id, ())) < needed:
            raise ValueError(f"task {task.task_id!r} needs at least {needed} completions for pass@{needed}")
    require_sandbox(limits)
    programs = [task.program(completion) for task in tasks for completion in completions[task.task_id]]
    found = run_many(programs, limits=limits, workers=workers)
    unavailable = [outcome for outcome in found if outcome.status == "unavailable"]
    if unavailable:
        raise ValueError(
            f"{len(unavailable)} of {len(found)} programs were not run ({unavailable[0].message}): "
            "evaluate again when the machine has processes and memory to spare"
        )
    remaining = iter(found)
    outcomes = {task.task_id: [next(remaining) for _ in completions[task.task_id]] for task in tasks}
    return CodeScore(pass_at_k=score(outcomes, ks), outcomes=outcomes)


def _num_passed(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.status == "passed" for outcome in outcomes)
