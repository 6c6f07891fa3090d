"""Toy functions, their asserts, and a corpus that is split by syntax tree."""

import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipeline.toy_functions.cases import Arguments, draw_arguments, outputs, telling_cases
from data_pipeline.toy_functions.families import FAMILIES
from data_pipeline.toy_functions.shapes import Shape, write
from data_pipeline.toy_functions.trees import normalised_tree

NUM_TESTS = 8
NUM_RESULTS = 4


@dataclass(frozen=True, kw_only=True)
class ToyFunction:
    """A function: prompt (signature and docstring) and body, both ending in a newline.

    `kinds` are the kinds of its arguments, `tree` the hash of its normalised syntax tree.
    """

    name: str
    prompt: str
    body: str
    kinds: tuple[str, ...]
    tree: str
    family: str

    @cached_property
    def cases(self) -> list[tuple[Arguments, object]]:
        """Inputs with their expected results, as different as can be; worked out on first use."""
        rng = random.Random(self.prompt + self.body)
        inputs = [draw_arguments(self.kinds, rng) for _ in range(40)]
        return telling_cases(inputs, outputs(self.prompt, self.body, self.name, inputs), NUM_TESTS)

    @property
    def tests(self) -> tuple[str, ...]:
        """Assert statements."""
        return self.asserts(self.name)

    def asserts(self, called: str) -> tuple[str, ...]:
        """Assert statements on a function that goes by the name `called`."""
        return tuple(f"assert {called}({', '.join(map(repr, inputs))}) == {result!r}" for inputs, result in self.cases)


@dataclass(frozen=True, kw_only=True)
class ToyCorpus:
    """Functions to train on and functions held out; no syntax tree is in both."""

    train: list[ToyFunction]
    held_out: list[ToyFunction]


def build_corpus(
    *, num_trees: int = 12_000, variants: int = 4, held_out_fraction: float = 0.03, seed: int = 0
) -> ToyCorpus:
    """A corpus of `num_trees` syntax trees: `variants` functions of each training tree, one of each held out.

    The same arguments give the same corpus. Raises ValueError when there are fewer trees than asked for.
    """
    rng = random.Random(seed)
    num_held_out = round(held_out_fraction * num_trees)
    held_out: list[ToyFunction] = []
    train: list[ToyFunction] = []
    for tree, shape in _distinct_shapes(num_trees, rng):
        if len(held_out) < num_held_out and (telling := _telling_variant(shape, tree, rng)):
            held_out.append(telling)
        else:
            train += [_variant(shape, tree, rng) for _ in range(variants)]
    rng.shuffle(train)
    return ToyCorpus(train=train, held_out=held_out)


def generate(count: int, seed: int) -> list[ToyFunction]:
    """`count` functions with distinct syntax trees."""
    return build_corpus(num_trees=count, variants=1, held_out_fraction=0.0, seed=seed).train


def write_tasks(functions: Iterable[ToyFunction], path: str | Path) -> None:
    """Writes functions as HumanEval-format JSONL, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("w") as file:
        for index, function in enumerate(functions):
            file.write(json.dumps(_task(function, index)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _task(function: ToyFunction, index: int) -> dict[str, str]:
    checks = "".join(f"    {line}\n" for line in function.asserts("candidate"))
    return {
        "task_id": f"toy_functions/{index}",
        "prompt": function.prompt,
        "entry_point": function.name,
        "canonical_solution": function.body,
        "test": f"def check(candidate):\n{checks}",
    }


def _distinct_shapes(count: int, rng: random.Random) -> list[tuple[str, Shape]]:
    """Shapes with distinct trees and distinct behaviour, as evenly from the families as their sizes allow."""
    pools = [_distinct_behaviour(list(shapes()), rng) for shapes in FAMILIES.values()]
    chosen: dict[str, Shape] = {}
    while len(chosen) < count:
        drawn = [(pool, shape) for pool in pools if (shape := next(pool, None)) is not None]
        if not drawn:
            raise ValueError(f"num_trees must be at most {len(chosen)}, the number there is; got {count}")
        for _, shape in drawn[: count - len(chosen)]:
            chosen[_tree(shape)] = shape
        pools = [pool for pool, _ in drawn]
    items = list(chosen.items())
    rng.shuffle(items)
    return items


def _distinct_behaviour(shapes: list[Shape], rng: random.Random) -> Iterator[Shape]:
    """The shapes in random order, without those that behave like an earlier one or hardly do anything."""
    rng.shuffle(shapes)
    seen: set[tuple[str, ...]] = set()
    for shape in shapes:
        behaviour = _behaviour(shape)
        if len(set(behaviour)) > 2 and behaviour not in seen:
            seen.add(behaviour)
            yield shape


def _behaviour(shape: Shape) -> tuple[str, ...]:
    """Results on fixed inputs, for two fixed choices of constants."""
    rng = random.Random(2)
    inputs = [draw_arguments(shape.kinds, rng) for _ in range(16)]
    written = [write(shape, random.Random(seed)) for seed in (1, 3)]
    return tuple(repr(result) for one in written for result in outputs(one.prompt, one.body, one.name, inputs))


def _tree(shape: Shape) -> str:
    written = write(shape, random.Random(1))
    return normalised_tree(written.prompt + written.body)


def _variant(shape: Shape, tree: str, rng: random.Random) -> ToyFunction:
    return ToyFunction(**write(shape, rng)._asdict(), kinds=shape.kinds, tree=tree, family=shape.family)


def _telling_variant(shape: Shape, tree: str, rng: random.Random) -> ToyFunction | None:
    """A variant whose asserts expect at least NUM_RESULTS different results; None where a few draws give none."""
    variants = (_variant(shape, tree, rng) for _ in range(12))
    telling = (v for v in variants if len({repr(result) for _, result in v.cases}) >= NUM_RESULTS)
    return next(telling, None)
