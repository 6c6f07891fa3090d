"""Recipes: every public function in a file of this folder that returns a RunConfig is one, under its own name.

A function that returns a dictionary of them is a family: `two_token` with the key `vmd` gives the recipe two_token_vmd.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from types import ModuleType

from ..config import RunConfig
from ..settings import validate

Family = dict[str, RunConfig]


@dataclass(frozen=True)
class Recipe:
    """A named run: how to build it, and what it is in one line."""

    build: Callable[[], RunConfig]
    summary: str


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    found: dict[str, Recipe] = {}
    for module_info in pkgutil.iter_modules(__path__):
        found |= _recipes_of(importlib.import_module(f"{__name__}.{module_info.name}"))
    return dict(sorted(found.items()))


def _recipes_of(module: ModuleType) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ != module.__name__ or name.startswith("_"):
            continue
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        if inspect.signature(function).return_annotation is RunConfig:
            found[name] = Recipe(function, summary)
        elif inspect.signature(function).return_annotation == Family:
            for key, config in function().items():
                named = replace(config, name=f"{name}_{key}")
                found[named.name] = Recipe(partial(_itself, named), f"{summary} ({key})")
    return found


def _itself(config: RunConfig) -> RunConfig:
    return config


def build(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of a recipe with dotted overrides.

    Raises:
        ValueError: no such recipe (names the nearest), or settings with problems.
    """
    known = recipes()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"{name!r} is not a recipe: {guess}`penumbra recipes` lists all {len(known)}")
    return validate(asdict(known[name].build()), overrides)
