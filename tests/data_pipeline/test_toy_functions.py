"""The generator of toy functions: counted and split by syntax tree, described without ambiguity, tested."""

import ast
import json
import re

import pytest

from data_pipeline.toy_functions import ToyCorpus, build_corpus, generate, normalised_tree, write_tasks
from data_pipeline.toy_functions.families import FAMILIES


@pytest.fixture(scope="module")
def corpus() -> ToyCorpus:
    return build_corpus(variants=2)


def signature_and_docstring(prompt: str) -> str:
    """Without the function's name, argument names and constants made equal."""
    (function,) = ast.parse(prompt).body
    assert isinstance(function, ast.FunctionDef)
    text = ast.get_docstring(function) or ""
    for place, argument in enumerate(function.args.args):
        text = re.sub(rf"\b{argument.arg}\b", "PQ"[place], text)
    return re.sub(r"\d", "0", re.sub(r'"\w"', '""', text)) + f"/{len(function.args.args)}"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (
            "def f(a, b):\n    return a - b * 3\n",
            "def g(x, y):\n    '''Doc.'''\n    return x - y * 7\n",
            True,
        ),
        ("def f(a, b):\n    return a - b\n", "def f(a, b):\n    return b - a\n", False),
        ("def f(a):\n    return a + 3\n", "def f(a):\n    return a + 'x'\n", False),
        ("def f(a):\n    return a + 3\n", "def f(a):\n    return a + a\n", False),
        ("def f(t):\n    return t.upper()\n", "def f(t):\n    return t.lower()\n", False),
        ("def f(t):\n    return max(t)\n", "def f(t):\n    return min(t)\n", False),
        ("def f(t):\n    return [v for v in t]\n", "def f(t):\n    return [w for w in t]\n", True),
        ("def f(t):\n    return [v for v in t]\n", "def f(t):\n    return [t for v in t]\n", False),
        ("def f(max):\n    return max\n", "def f(min):\n    return min\n", True),
    ],
)
def test_trees_ignore_names_and_constants_only(first: str, second: str, same: bool) -> None:
    assert (normalised_tree(first) == normalised_tree(second)) is same


def test_ten_thousand_trees_none_of_them_on_both_sides(corpus: ToyCorpus) -> None:
    """Trees are counted anew from the source of every function, not taken from the field."""
    train = {normalised_tree(function.prompt + function.body) for function in corpus.train}
    held_out = [normalised_tree(function.prompt + function.body) for function in corpus.held_out]
    assert len(train | set(held_out)) >= 10_000
    assert not train & set(held_out)
    assert len(held_out) == len(set(held_out)) == 360
    assert len(corpus.train) == 2 * len(train)
    sample = corpus.train[:300] + corpus.held_out
    assert all(function.tree == normalised_tree(function.prompt + function.body) for function in sample)


def test_every_family_is_on_both_sides(corpus: ToyCorpus) -> None:
    assert {function.family for function in corpus.train} == set(FAMILIES)
    assert {function.family for function in corpus.held_out} == set(FAMILIES)


def test_a_docstring_determines_the_tree(corpus: ToyCorpus) -> None:
    trees: dict[str, str] = {}
    for function in corpus.train + corpus.held_out:
        described = signature_and_docstring(function.prompt + "    pass\n")
        assert trees.setdefault(described, function.tree) == function.tree, function.prompt


def test_no_shape_of_any_family_shares_its_docstring() -> None:
    bodies: dict[tuple[str, tuple[str, ...]], str] = {}
    for shapes in FAMILIES.values():
        for shape in shapes():
            assert bodies.setdefault((shape.docstring, shape.kinds), shape.body) == shape.body


def test_constants_and_arguments_of_the_body_are_in_the_prompt(corpus: ToyCorpus) -> None:
    for function in corpus.train[:2000]:
        body_letters = re.findall(r'"(\w)"', function.body)
        assert body_letters == re.findall(r'"(\w)"', function.prompt)
        body_digits = [digit for digit in re.findall(r"\d", function.body) if digit not in "01"]
        remaining = iter(re.findall(r"\d", function.prompt.replace("double it", "2").replace("second", "2")))
        assert all(digit in remaining for digit in body_digits), function.prompt + function.body


def test_asserts_pass_on_the_body_and_fail_on_other_functions(corpus: ToyCorpus) -> None:
    passed = tried = 0
    for place, function in enumerate(corpus.held_out[:150]):
        namespace: dict[str, object] = {}
        exec(function.prompt + function.body, namespace)
        assert len(function.tests) >= 5
        assert len({test.split(" == ")[1] for test in function.tests}) >= 3
        exec("\n".join(function.tests), namespace)
        peers = [other for other in corpus.train if other.kinds == function.kinds]
        for other in peers[place * 7 : place * 7 + 5]:
            exec(other.prompt + other.body, namespace)
            namespace[function.name] = namespace[other.name]
            tried += 1
            try:
                exec("\n".join(function.tests), namespace)
                passed += 1
            except Exception:
                continue
    assert tried > 500
    assert passed / tried < 0.02


def test_the_same_seed_gives_the_same_functions_and_another_seed_others() -> None:
    first, again, other = (build_corpus(num_trees=300, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.train != other.train
    assert {f.tree for f in first.held_out} != {f.tree for f in other.held_out}


def test_generate_gives_distinct_trees() -> None:
    functions = generate(200, seed=1)
    assert len({function.tree for function in functions}) == len(functions) == 200


def test_too_many_trees_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "data_pipeline.toy_functions.corpus.FAMILIES",
        {"words": FAMILIES["words"], "while": FAMILIES["while"]},
    )
    with pytest.raises(ValueError, match=r"num_trees must be at most \d+"):
        build_corpus(num_trees=100_000)


def test_tasks_are_written_in_humaneval_format(corpus: ToyCorpus, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "tasks.jsonl"
    write_tasks(corpus.held_out[:20], path)
    assert [file.name for file in tmp_path.iterdir()] == ["tasks.jsonl"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["task_id"] for record in records}) == 20
    for record in records:
        namespace: dict[str, object] = {}
        exec(record["prompt"] + record["canonical_solution"] + "\n" + record["test"], namespace)
        exec(f"check({record['entry_point']})", namespace)
        with pytest.raises((AssertionError, TypeError)):
            exec("check(lambda *arguments: None)", namespace)
