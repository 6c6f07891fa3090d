"""Tasks, pass@k and the baseline that copies."""

import gzip
import json
import sys
from itertools import combinations
from pathlib import Path

import pytest

import eval.code
from eval.code import Limits, NearestExample, Outcome, evaluate, pass_at_k, read_tasks, score

DEMO = Path(eval.code.__file__).parent / "data" / "demo_tasks.jsonl"
RECORD = {"task_id": "t/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""}
LIMITS = Limits(seconds=20.0)


def test_demo_tasks_are_solved_by_their_solutions_and_by_nothing() -> None:
    tasks = read_tasks(DEMO)
    assert len(tasks) == 20
    completions = {task.task_id: [task.canonical_solution, "    return None\n"] for task in tasks}
    result = evaluate(tasks, completions, limits=LIMITS, workers=2, ks=(1, 2))
    assert result.pass_at_k == {1: 0.5, 2: 1.0}
    for task in tasks:
        assert [outcome.status == "passed" for outcome in result.outcomes[task.task_id]] == [True, False]


def test_compressed_tasks_with_further_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({**RECORD, "plus_input": [[1]]}) + "\n\n").encode()))
    assert [task.task_id for task in read_tasks(path)] == ["t/0"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (json.dumps(RECORD) + "\n{", r"tasks\.jsonl:2: not JSON"),
        ("[1]", r"tasks\.jsonl:1: must be a JSON object"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "test"}), r"jsonl:1: key 'test' is missing"),
        (json.dumps({**RECORD, "prompt": 3}), r"jsonl:1: key 'prompt' is not a string"),
        (json.dumps(RECORD) + "\n" + json.dumps(RECORD), r"jsonl:2: task_id 't/0' occurs twice"),
        ("\n", "has no tasks"),
    ],
)
def test_bad_tasks_are_named_by_file_line_and_key(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_tasks(path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read tasks from .*absent\.jsonl"):
        read_tasks(tmp_path / "absent.jsonl")
    whole = gzip.compress(json.dumps(RECORD).encode())
    for content in (b"not gzip", whole[: len(whole) // 2]):
        (tmp_path / "tasks.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read tasks from .*tasks\.jsonl\.gz"):
            read_tasks(tmp_path / "tasks.jsonl.gz")


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration_of_all_draws(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            draws = [any(draw) for draw in combinations(samples, k)]
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_refuses_impossible_counts() -> None:
    for arguments in ((5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0)):
        with pytest.raises(ValueError, match="must be from"):
            pass_at_k(*arguments)


def test_scores_are_means_over_tasks() -> None:
    right, wrong = Outcome(status="passed"), Outcome(status="timed_out")
    outcomes = {"a": [right, wrong, wrong, wrong], "b": [right, right, wrong, wrong], "c": [wrong] * 4}
    assert score(outcomes, (1, 2)) == pytest.approx({1: 0.25, 2: (0.5 + 5 / 6 + 0) / 3})


def test_a_task_without_enough_completions_is_named() -> None:
    tasks = read_tasks(DEMO)
    with pytest.raises(ValueError, match="'demo/1' needs at least 1 completions"):
        evaluate(tasks, {"demo/0": [""]}, limits=LIMITS, workers=1)
    with pytest.raises(ValueError, match="'demo/0' needs at least 2 completions"):
        evaluate(tasks, {task.task_id: [""] for task in tasks}, limits=LIMITS, workers=1, ks=(2,))


def test_where_nothing_can_be_run_nothing_is_scored() -> None:
    tasks = read_tasks(DEMO)[:1]
    completions = {tasks[0].task_id: [tasks[0].canonical_solution]}
    with pytest.raises(ValueError, match=r"programs can not be run here .*: raise --seconds"):
        evaluate(tasks, completions, limits=Limits(seconds=1e-6), workers=1)


def test_a_program_that_was_not_run_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = read_tasks(DEMO)[:2]
    completions = {task.task_id: [task.canonical_solution] for task in tasks}
    gone = [Outcome(status="passed"), Outcome(status="unavailable", message="no processes left")]
    monkeypatch.setattr(sys.modules[evaluate.__module__], "run_many", lambda programs, **settings: gone)
    with pytest.raises(ValueError, match=r"1 of 2 programs were not run \(no processes left\)"):
        evaluate(tasks, completions, limits=LIMITS, workers=1)


EXAMPLES = [
    ('def f(x, y):\n    """Add y to x."""\n', "    return x + y\n"),
    ('def f(x, y):\n    """Add x to y."""\n', "    return y + x\n"),
    ('def f(a, b):\n    """Add b to a."""\n', "    return a + b  # twin\n"),
    ('def f(text):\n    """Reverse text and drop 3 characters."""\n', "    return text[::-1][3:]\n"),
    ('def f(text):\n    """Drop 3 characters and reverse text."""\n', "    return text[3:][::-1]\n"),
]


def test_the_nearest_docstring_is_found_and_its_body_gets_the_prompts_arguments() -> None:
    nearest = NearestExample(EXAMPLES)
    body = nearest.body_for('def g(left, right):\n    """Add right to left."""\n')
    assert body == "    return left + right\n"
    assert nearest.body_for('def g(y, x):\n    """Add y to x."""\n') == "    return x + y\n"
    assert "[::-1][3:]" in nearest.body_for('def g(line):\n    """Reverse line, drop 3 characters."""\n')


def test_every_training_prompt_finds_its_own_body() -> None:
    examples = EXAMPLES[:2] + EXAMPLES[3:]
    nearest = NearestExample(examples)
    assert [nearest.body_for(prompt) for prompt, _ in examples] == [body for _, body in examples]


def test_nearest_agrees_with_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    docstrings = [f"Take {a}, then {b} by {a} and {b} {c}." for a in "pqrs" for b in ("add", "cut") for c in "37"]
    examples = [(f'def f():\n    """{d}"""\n', f"{place}") for place, d in enumerate(docstrings)]
    queries = ["Take p, add q and cut 7", "s by s cut", "then add 3 by r"]
    vectors = text.TfidfVectorizer(
        ngram_range=(1, 2), token_pattern=r"[A-Za-z_]+\d?|\d|[^\sA-Za-z_\d]", lowercase=False
    )
    known = vectors.fit_transform(docstrings)
    similarity = (vectors.transform(queries) @ known.T).toarray()
    nearest = NearestExample(examples)
    for query, row in zip(queries, similarity):
        found = int(nearest.body_for(f'def f():\n    """{query}"""\n'))
        assert row[found] == pytest.approx(row.max(), abs=1e-12)


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        NearestExample([])
