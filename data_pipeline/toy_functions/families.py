"""The families of functions: every combination of a few phrases, each phrase standing for one piece of code.

A docstring names the pieces in the order in which the code has them, so it determines the function.
"""

from collections.abc import Callable, Iterator
from itertools import combinations, product

from data_pipeline.toy_functions.shapes import Piece, Shape, shape

UPDATES = (
    Piece("add #", "$a += #"),
    Piece("add $b", "$a += $b"),
    Piece("subtract #", "$a -= #"),
    Piece("subtract $b", "$a -= $b"),
    Piece("multiply by #", "$a *= #"),
    Piece("multiply by $b", "$a *= $b"),
    Piece("divide by #", "$a //= #"),
    Piece("take the remainder by #", "$a %= #"),
    Piece("negate", "$a = -$a"),
    Piece("take the absolute value", "$a = abs($a)"),
    Piece("raise to at least #", "$a = max($a, #)"),
    Piece("raise to at least $b", "$a = max($a, $b)"),
    Piece("limit to at most #", "$a = min($a, #)"),
    Piece("limit to at most $b", "$a = min($a, $b)"),
)
COMPARISONS = (
    Piece("$a is greater than #", "$a > #"),
    Piece("$a is less than #", "$a < #"),
    Piece("$a is divisible by #", "$a % # == 0"),
    Piece("$b is greater than #", "$b > #"),
    Piece("$b is less than #", "$b < #"),
    Piece("$b is divisible by #", "$b % # == 0"),
    Piece("$a is greater than $b", "$a > $b"),
    Piece("$a is less than $b", "$a < $b"),
    Piece("$a plus $b is greater than #", "$a + $b > #"),
    Piece("$a minus $b is less than #", "$a - $b < #"),
)
EXPRESSIONS = (
    Piece("$a plus #", "$a + #"),
    Piece("$a minus #", "$a - #"),
    Piece("$a times #", "$a * #"),
    Piece("$a divided by #", "$a // #"),
    Piece("$a modulo #", "$a % #"),
    Piece("$b plus #", "$b + #"),
    Piece("$b minus #", "$b - #"),
    Piece("$b times #", "$b * #"),
    Piece("$b divided by #", "$b // #"),
    Piece("$b modulo #", "$b % #"),
    Piece("$a plus $b", "$a + $b"),
    Piece("$a minus $b", "$a - $b"),
    Piece("$b minus $a", "$b - $a"),
    Piece("$a times $b", "$a * $b"),
    Piece("minus $a", "-$a"),
    Piece("minus $b", "-$b"),
)
FILTERS = (
    Piece("greater than #", "v > #"),
    Piece("less than #", "v < #"),
    Piece("greater than $b", "v > $b"),
    Piece("less than $b", "v < $b"),
    Piece("divisible by #", "v % # == 0"),
    Piece("not divisible by #", "v % # != 0"),
    Piece("different from $b", "v != $b"),
)
ELEMENTS = (
    Piece("v", "v"),
    Piece("v plus #", "v + #"),
    Piece("v minus #", "v - #"),
    Piece("v times #", "v * #"),
    Piece("v modulo #", "v % #"),
    Piece("v divided by #", "v // #"),
    Piece("v plus $b", "v + $b"),
    Piece("v minus $b", "v - $b"),
    Piece("v times $b", "v * $b"),
    Piece("v times v", "v * v"),
    Piece("minus v", "-v"),
    Piece("the absolute value of v", "abs(v)"),
)
REDUCERS = (
    ("the list of", "[", "]"),
    ("the number of", "len([", "])"),
    ("the sum of", "sum([", "])"),
    ("the sorted list of", "sorted([", "])"),
    ("the largest or 0 of", "max([", "], default=0)"),
    ("the smallest or 0 of", "min([", "], default=0)"),
)
ACCUMULATIONS = (
    Piece("add #", "total += #"),
    Piece("add v", "total += v"),
    Piece("add v times #", "total += v * #"),
    Piece("add v modulo #", "total += v % #"),
    Piece("add v times $b", "total += v * $b"),
    Piece("add v times v", "total += v * v"),
    Piece("subtract #", "total -= #"),
    Piece("subtract v", "total -= v"),
    Piece("subtract v modulo #", "total -= v % #"),
    Piece("subtract $b", "total -= $b"),
    Piece("double it", "total *= 2"),
)
COUNTDOWNS = (
    Piece("subtract # from $a", "$a -= #"),
    Piece("divide $a by #", "$a //= #"),
)
COUNTINGS = (
    Piece("add 1", "total += 1"),
    Piece("add $a", "total += $a"),
    Piece("add $a times #", "total += $a * #"),
    Piece("add $a modulo #", "total += $a % #"),
    Piece("add $a times $b", "total += $a * $b"),
    Piece("add $a minus $b", "total += $a - $b"),
    Piece("add $b", "total += $b"),
    Piece("subtract $a", "total -= $a"),
    Piece("subtract $a modulo #", "total -= $a % #"),
    Piece("double it", "total *= 2"),
)
METHODS = (
    Piece("strip it", "$a = $a.strip()"),
    Piece("convert it to upper case", "$a = $a.upper()"),
    Piece("convert it to lower case", "$a = $a.lower()"),
    Piece("swap its case", "$a = $a.swapcase()"),
    Piece("capitalize it", "$a = $a.capitalize()"),
    Piece("reverse it", "$a = $a[::-1]"),
    Piece("take every second character", "$a = $a[::2]"),
    Piece("keep the first ~ characters", "$a = $a[:~]"),
    Piece("drop the first ~ characters", "$a = $a[~:]"),
    Piece("keep the last ~ characters", "$a = $a[-~:]"),
    Piece("drop the last ~ characters", "$a = $a[:-~]"),
    Piece('replace "@" by "@"', '$a = $a.replace("@", "@")'),
    Piece('remove "@"', '$a = $a.replace("@", "")'),
)
STRING_RESULTS = (
    Piece("", "$a"),
    Piece(', append "@"', '$a + "@"'),
    Piece(', count "@"', '$a.count("@")'),
    Piece(', find "@"', '$a.find("@")'),
    Piece(', split it at "@"', '$a.split("@")'),
)
WORDS = (
    Piece("w", "w"),
    Piece("w in upper case", "w.upper()"),
    Piece("w capitalized", "w.capitalize()"),
    Piece("w reversed", "w[::-1]"),
    Piece("the first ~ characters of w", "w[:~]"),
    Piece("w without its first ~ characters", "w[~:]"),
    Piece("the last ~ characters of w", "w[-~:]"),
    Piece('w plus "@"', 'w + "@"'),
    Piece('"@" plus w', '"@" + w'),
    Piece('w with "@" replaced by "@"', 'w.replace("@", "@")'),
    Piece("the length of w", "len(w)"),
    Piece('the count of "@" in w', 'w.count("@")'),
)
WORD_TESTS = (
    Piece("is longer than #", "len(w) > #"),
    Piece("is shorter than #", "len(w) < #"),
    Piece('contains "@"', '"@" in w'),
    Piece('does not contain "@"', '"@" not in w'),
    Piece('starts with "@"', 'w.startswith("@")'),
    Piece('ends with "@"', 'w.endswith("@")'),
)
WORD_RESULTS = (
    ("the list of", "[", "]"),
    ("the sorted list of", "sorted([", "])"),
    ("the number of", "len([", "])"),
    ("the number of different", "len({", "})"),
)


def arithmetic() -> Iterator[Shape]:
    """Two to four updates of the first argument, one a line."""
    for length in (2, 3, 4):
        for updates in product(UPDATES, repeat=length):
            docstring = f"Take $a, {', '.join(update.says for update in updates)}."
            yield shape("arithmetic", "number", docstring, [update.code for update in updates] + ["return $a"])


def conditional() -> Iterator[Shape]:
    """One of two expressions, by a comparison."""
    for test, first, second in product(COMPARISONS, EXPRESSIONS, EXPRESSIONS):
        docstring = f"If {test.says}, return {first.says}, otherwise return {second.says}."
        lines = [f"if {test.code}:", f"    return {first.code}", f"return {second.code}"]
        yield shape("conditional", "number", docstring, lines)


def comprehension() -> Iterator[Shape]:
    """A reduction of the elements that pass one or two tests."""
    for reducer, element, test in product(REDUCERS, ELEMENTS, _tests(FILTERS)):
        says, opening, closing = reducer
        if says == "the number of" and element.code != "v":
            continue
        docstring = f"Return {says} {element.says} for every v in $a that is {test.says}."
        yield shape(
            "comprehension",
            "numbers",
            docstring,
            [f"return {opening}{element.code} for v in $a if {test.code}{closing}"],
        )


def loop() -> Iterator[Shape]:
    """A running total over the elements, or over the numbers below an argument, with one or two branches."""
    headers = (Piece("v in $a", "v in $a"), Piece("v below $a", "v in range($a)"))
    kinds = ("numbers", "number")
    alternatives = (None, *ACCUMULATIONS)
    for (kind, header), test, then, other in product(zip(kinds, headers), FILTERS, ACCUMULATIONS, alternatives):
        otherwise = f", otherwise {other.says}" if other else ""
        statement = f"if v is {test.says}, {then.says}{otherwise}"
        docstring = f"Set total to #. For every {header.says}, {statement}. Return total."
        lines = ["total = #", f"for {header.code}:", f"    if {test.code}:", f"        {then.code}"]
        lines += ["    else:", f"        {other.code}"] if other else []
        yield shape("loop", kind, docstring, [*lines, "return total"])


def while_() -> Iterator[Shape]:
    """A total that is updated while the first argument comes down."""
    for step, counting, second in product(COUNTDOWNS, COUNTINGS, (None, *COUNTINGS)):
        orders = [(step, counting, second), (counting, step, second), (counting, second, step)]
        for statements in orders[: 3 if second else 2]:
            pieces = [statement for statement in statements if statement]
            says = ", ".join(piece.says for piece in pieces)
            lines = ["total = #", "while $a > #:", *(f"    {piece.code}" for piece in pieces), "return total"]
            yield shape("while", "number", f"Set total to #. While $a is greater than #, {says}. Return total.", lines)


def string() -> Iterator[Shape]:
    """Two or three string operations, one a line, and what is returned of the outcome."""
    for length in (2, 3):
        for methods, result in product(product(METHODS, repeat=length), STRING_RESULTS):
            docstring = f"Take $a, {', '.join(method.says for method in methods)}{result.says}."
            lines = [*(method.code for method in methods), f"return {result.code}"]
            yield shape("string", "text", docstring, lines)


def words() -> Iterator[Shape]:
    """A reduction of the words of a text that pass one or two tests."""
    for (says, opening, closing), element, test in product(WORD_RESULTS, WORDS, _tests(WORD_TESTS)):
        if says == "the number of" and element.code != "w":
            continue
        docstring = f"Return {says} {element.says} for every word w in $a that {test.says}."
        code = f"return {opening}{element.code} for w in $a.split() if {test.code}{closing}"
        yield shape("words", "text", docstring, [code])


FAMILIES: dict[str, Callable[[], Iterator[Shape]]] = {
    "arithmetic": arithmetic,
    "conditional": conditional,
    "comprehension": comprehension,
    "loop": loop,
    "while": while_,
    "string": string,
    "words": words,
}


def _tests(pieces: tuple[Piece, ...]) -> list[Piece]:
    joined = [
        Piece(f"{first.says} {word} {second.says}", f"{first.code} {word} {second.code}")
        for (first, second), word in product(combinations(pieces, 2), ("and", "or"))
    ]
    return [*pieces, *joined]
