"""Recipes: every public function in a file of this folder that returns a RunConfig is one, under its own name."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import asdict

from ..config import RunConfig, validate

Recipe = Callable[[], RunConfig]


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    found: dict[str, Recipe] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and inspect.signature(function).return_annotation is RunConfig:
                found[name] = function
    return dict(sorted(found.items()))


def build(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of a recipe with dotted overrides.

    Raises:
        ValueError: no such recipe (names the nearest), or settings with problems.
    """
    known = recipes()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(
            f"{name!r} is not a recipe: did you mean {nearest[0]}? `penumbra recipes` lists all {len(known)}"
        )
    return validate(asdict(known[name]()), overrides)
