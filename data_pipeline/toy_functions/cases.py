"""Inputs for functions of known argument kinds, and what a body returns for them."""

import random
from collections.abc import Callable, Sequence

WORDS = (
    "apple Banana cherry Orange lemon otter LION tiger rabbit Sparrow stone river Ocean island tulip "
    "rose Nettle autumn winter silent LOUD quick slow under over tea sun art nose ear"
)
Arguments = tuple[object, ...]


def draw_arguments(kinds: Sequence[str], rng: random.Random) -> Arguments:
    """One value per kind: "number" (an int), "numbers" (a list of ints) or "text" (a few words)."""
    return tuple(_DRAWS[kind](rng) for kind in kinds)


def outputs(prompt: str, body: str, name: str, inputs: Sequence[Arguments]) -> list[object]:
    """What the function returns for each input. It runs in this process: for generated functions only."""
    namespace: dict[str, Callable[..., object]] = {}
    exec(compile(prompt + body, "<toy function>", "exec"), namespace)
    return [namespace[name](*arguments) for arguments in inputs]


def telling_cases(inputs: Sequence[Arguments], results: Sequence[object], count: int) -> list[tuple[Arguments, object]]:
    """`count` of the cases, those with results not seen before first."""
    seen: set[str] = set()
    new: list[tuple[Arguments, object]] = []
    repeated: list[tuple[Arguments, object]] = []
    for arguments, result in zip(inputs, results):
        (repeated if repr(result) in seen else new).append((arguments, result))
        seen.add(repr(result))
    return (new + repeated)[:count]


def _number(rng: random.Random) -> int:
    return rng.randint(-12, 30)


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 20) for _ in range(rng.choice((0, 4, 6, 8, 10)))]


def _text(rng: random.Random) -> str:
    return rng.choice(("", "", " ")) + " ".join(rng.sample(WORDS.split(), rng.randint(2, 6))) + rng.choice(("", " "))


_DRAWS: dict[str, Callable[[random.Random], object]] = {
    "number": _number,
    "numbers": _numbers,
    "text": _text,
}
