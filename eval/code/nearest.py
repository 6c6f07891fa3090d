"""The baseline that copies: the body of the training example whose docstring is nearest."""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[A-Za-z_]+\d?|\d|[^\sA-Za-z_\d]")


class NearestExample:
    """Finds training examples by the TF-IDF cosine of their docstrings, over words and word pairs.

    It is made strong on purpose: argument names are read as their positions when docstrings are compared, and
    the copied body gets the argument names of the prompt. `examples` are pairs of prompt (signature and
    docstring) and body; those that differ only in argument names count once.
    """

    def __init__(self, examples: Iterable[tuple[str, str]]) -> None:
        self.bodies: list[str] = []
        counts: list[Counter[str]] = []
        seen: set[tuple[str, str]] = set()
        for prompt, body in examples:
            arguments, docstring = _split(prompt)
            key = (_rename(docstring, arguments), _rename(body, arguments))
            if key not in seen:
                seen.add(key)
                counts.append(_terms(key[0]))
                self.bodies.append(key[1])
        if not self.bodies:
            raise ValueError("there are no training examples to copy from; give at least one")
        self._index(counts)

    def _index(self, counts: list[Counter[str]]) -> None:
        """Keeps, per term, the examples that have it and the term's share of their unit vectors."""
        num_having = Counter(term for terms in counts for term in terms)
        self.idf = {term: math.log((1 + len(counts)) / (1 + num)) + 1 for term, num in num_having.items()}
        postings: dict[str, tuple[list[int], list[float]]] = {term: ([], []) for term in num_having}
        for row, terms in enumerate(counts):
            norm = math.sqrt(sum((count * self.idf[term]) ** 2 for term, count in terms.items())) or 1.0
            for term, count in terms.items():
                postings[term][0].append(row)
                postings[term][1].append(count * self.idf[term] / norm)
        self.postings: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {
            term: (np.array(rows, np.int64), np.array(weights)) for term, (rows, weights) in postings.items()
        }

    def body_for(self, prompt: str) -> str:
        """The nearest example's body, with the prompt's argument names; of equally near ones the first."""
        arguments, docstring = _split(prompt)
        similarity = np.zeros(len(self.bodies))
        for term, count in _terms(_rename(docstring, arguments)).items():
            if term in self.postings:
                rows, weights = self.postings[term]
                similarity[rows] += count * self.idf[term] * weights
        body = self.bodies[int(np.argmax(similarity))]
        for place, argument in enumerate(arguments):
            body = re.sub(rf"\b_argument{place}\b", argument, body)
        return body


def _split(prompt: str) -> tuple[list[str], str]:
    """Argument names and docstring of the last function in a prompt; the whole prompt where there is none."""
    try:
        functions = [node for node in ast.parse(prompt + "    pass\n").body if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return [], prompt
    if not functions:
        return [], prompt
    return [argument.arg for argument in functions[-1].args.args], ast.get_docstring(functions[-1]) or ""


def _rename(text: str, arguments: list[str]) -> str:
    for place, argument in enumerate(arguments):
        text = re.sub(rf"\b{argument}\b", f"_argument{place}", text)
    return text


def _terms(text: str) -> Counter[str]:
    words = _WORD.findall(text)
    return Counter([*words, *map(" ".join, pairwise(words))])
