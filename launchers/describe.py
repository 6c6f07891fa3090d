"""Recipes as text: a list with sizes, or every setting of one with its meaning."""

from dataclasses import fields, is_dataclass
from typing import Any

from pretrain.recipes import build, recipes


def list_recipes() -> str:
    """One line per recipe: name, row length, batch, steps, summary."""
    rows = []
    for name, recipe in recipes().items():
        config = recipe.build()
        rows.append((name, config.data.length, config.train.batch_tokens, config.train.steps, recipe.summary))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'recipe':<{width}}  {'length':>6}  {'tokens/step':>11}  {'steps':>9}"]
    lines += [f"{n:<{width}}  {length:>6}  {tokens:>11,}  {steps:>9,}  {doc}" for n, length, tokens, steps, doc in rows]
    return "\n".join([*lines, "", "`penumbra recipes RECIPE` shows every setting of one."])


def describe_recipe(name: str) -> str:
    """Every dotted key of a recipe with its value and meaning."""
    return "\n".join(_describe(build(name), ""))


def _describe(settings: Any, prefix: str) -> list[str]:
    meanings = field_docs(type(settings))
    lines = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            lines += ["", f"# {meanings[f.name]}", *_describe(value, f"{prefix}{f.name}.")]
        else:
            lines.append(f"{f'{prefix}{f.name}={_plain(value)}':<44}  {meanings[f.name]}")
    return lines


def field_docs(settings: type) -> dict[str, str]:
    """The string under each field of a settings class."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(settings).json_schema(ref_template="{model}")
    return {name: entry.get("description", "") for name, entry in schema.get("properties", {}).items()}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
