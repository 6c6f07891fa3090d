"""A shape is a function without its names and constants: the unit that is counted, split and enumerated.

Docstrings and bodies are templates with the same constants in the same order:
`$a` and `$b` are the arguments, `#` is a digit 2..9, `~` a digit 1..4, `@` a letter.
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

ARGUMENT_NAMES = {
    "number": (("x", "n", "a"), ("y", "k", "m")),
    "numbers": (("values", "numbers", "items"), ()),
    "text": (("text", "line", "title"), ()),
}
FUNCTION_NAMES = {
    "arithmetic": ("compute", "adjust", "transform"),
    "conditional": ("choose", "decide", "compute"),
    "comprehension": ("select", "collect", "process"),
    "loop": ("total_of", "accumulate", "process"),
    "while": ("count_down", "accumulate", "compute"),
    "string": ("convert", "format_text", "transform"),
    "words": ("select", "convert", "collect"),
}
LETTERS = "aeiostrn"
_CONSTANT = re.compile(r"[#~@]")


class Piece(NamedTuple):
    """An English phrase and the code it stands for."""

    says: str
    code: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Templates of one function; `kinds` has one entry per argument: "number", "numbers" or "text"."""

    family: str
    kinds: tuple[str, ...]
    docstring: str
    body: str


class Written(NamedTuple):
    """A shape with its names and constants filled in."""

    name: str
    prompt: str
    body: str


def shape(family: str, first_kind: str, docstring: str, lines: list[str]) -> Shape:
    """A shape from its docstring and body lines; it has a second argument, a number, where these use `$b`."""
    body = "".join(f"    {line}\n" for line in lines)
    assert _CONSTANT.findall(docstring) == _CONSTANT.findall(body), (docstring, body)
    assert ("$b" in docstring) == ("$b" in body), (docstring, body)
    kinds = (first_kind, "number") if "$b" in body else (first_kind,)
    return Shape(family=family, kinds=kinds, docstring=docstring, body=body)


def write(shape: Shape, rng: random.Random) -> Written:
    """Fills a shape with drawn names and constants; letters of one function are distinct."""
    markers = _CONSTANT.findall(shape.body)
    letters = rng.sample(LETTERS, markers.count("@"))
    ranges = {"#": "23456789", "~": "1234"}
    constants = [letters.pop() if marker == "@" else rng.choice(ranges[marker]) for marker in markers]
    arguments = [rng.choice(ARGUMENT_NAMES[kind][place]) for place, kind in enumerate(shape.kinds)]
    name = rng.choice(FUNCTION_NAMES[shape.family])
    prompt = f'def {name}({", ".join(arguments)}):\n    """{_fill(shape.docstring, arguments, constants)}"""\n'
    return Written(name, prompt, _fill(shape.body, arguments, constants))


def _fill(template: str, arguments: list[str], constants: list[str]) -> str:
    remaining = iter(constants)
    filled = _CONSTANT.sub(lambda _: next(remaining), template)
    for place, argument in zip("ab", arguments):
        filled = filled.replace(f"${place}", argument)
    return filled
