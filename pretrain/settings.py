"""Configurations from dictionaries, YAML and dotted overrides, and back; every mistake is named, all at once."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from model.config import BackboneConfig

from .config import RunConfig
from .data_config import DataConfig


def validate(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from nested dictionaries and `dotted.key=value` overrides.

    Raises:
        ValueError: lists every unknown key (with the nearest real one), wrong type and inconsistency.
    """
    merged = _deep_copy(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not an override: write dotted.key=value, for example optim.lr=3e-4")
        _assign(merged, key, _parse(override, value))
    try:
        config = _adapter().validate_python(merged)
    except ValidationError as error:
        sentences = [_explain(item, merged) for item in error.errors()]
        raise ValueError(_join(list(dict.fromkeys(s for s in sentences if s)))) from None
    problems = list(config.problems())
    if problems:
        raise ValueError(_join(problems))
    return config


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    """Takes longer to build than to use."""
    return TypeAdapter(RunConfig)


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a config.yaml saved beside a run."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} can not be read as YAML ({reason}): pass the config.yaml of a run") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings: pass the config.yaml of a run")
    return validate(tree, overrides)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def known_keys(kinds: Mapping[str, str], settings: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that an override may set, where groups of several kinds (data, model.backbone) have these."""
    for f in fields(settings):
        key = f"{prefix}{f.name}"
        for group in [KINDS[key][kinds[key]]] if key in KINDS else _dataclasses_of(f.type):
            yield from known_keys(kinds, group, f"{key}.")
        yield key


def _dataclasses_of(annotation: Any) -> list[type]:
    if is_dataclass(annotation):
        return [annotation]  # type: ignore[list-item]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _dataclasses_of(part)]


KINDS: dict[str, dict[str, type]] = {
    path: {group.kind: group for group in _dataclasses_of(union)}  # type: ignore[attr-defined]
    for path, union in (("data", DataConfig), ("model.backbone", BackboneConfig))
}
"""Groups of settings that come in several kinds, the default one first."""


def _deep_copy(tree: Any) -> Any:
    return {k: _deep_copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _parse(override: str, value: str) -> Any:
    try:
        return yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise ValueError(f"{override!r} has a value that is not YAML: quote it, or close its brackets") from None


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def _explain(error: Any, tree: Mapping[str, Any]) -> str | None:
    """One sentence; None for what pydantic says about a kind of a group that was not meant."""
    parts = [str(part) for part in error["loc"]]
    kinds = {path: _kind(tree, path) for path in KINDS}
    for path, groups in KINDS.items():
        depth = path.count(".") + 1
        if ".".join(parts[:depth]) != path:
            continue
        if kinds[path] not in list(groups):
            return f"{path}.kind={kinds[path]!r} is not one of {', '.join(groups)}"
        if len(parts) > depth and parts.pop(depth) not in (kinds[path], groups[kinds[path]].__name__):
            return None
    key = ".".join(parts)
    if error["type"] == "unexpected_keyword_argument":
        legal = {path: kind if kind in list(KINDS[path]) else next(iter(KINDS[path])) for path, kind in kinds.items()}
        return _explain_unknown(key, legal, is_group=isinstance(error["input"], Mapping))
    if error["type"] == "union_tag_not_found":
        return f"{key}.kind is missing: set it to one of {', '.join(KINDS[key])}"
    given = "" if isinstance(error["input"], Mapping) else f"={error['input']!r}"
    if error["type"] in ("dataclass_type", "model_attributes_type"):
        return f"{key}{given}: {key} is a group of settings, write {key}.KEY=VALUE"
    return f"{key}{given}: {error['msg'][0].lower()}{error['msg'][1:].replace('tuple', 'list')}"


def _kind(tree: Any, path: str) -> Any:
    """The kind that the settings give to a group, the default one where they give none."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    default = next(iter(KINDS[path]))
    return tree.get("kind", default) if isinstance(tree, Mapping) else default


def _explain_unknown(key: str, kinds: Mapping[str, str], *, is_group: bool) -> str:
    for path, groups in KINDS.items():
        if key in {k for kind in groups for k in known_keys({**kinds, path: kind})}:
            return f"{key} is not a setting of {path}.kind={kinds[path]}"
    keys = list(known_keys(kinds))
    groups_of = {k.rpartition(".")[0] for k in keys}
    alike = [k for k in keys if (k in groups_of) == is_group]
    nearest = _nearest(key, alike)
    return f"{key} is not a setting: " + (
        f"did you mean {nearest}?" if nearest else "`penumbra recipes RECIPE` lists all of a recipe"
    )


def _nearest(key: str, keys: list[str]) -> str | None:
    """The key whose last part is the same, or is like it; of the same parent first."""
    parent, _, leaf = key.rpartition(".")
    below = [k for k in keys if k.startswith(f"{parent}.")]
    siblings = [k for k in below if k.rpartition(".")[0] == parent]
    for candidates, cutoff in ((below, 1.0), (keys, 1.0), (siblings, 0.6), (keys, 0.6), (siblings, 0.3)):
        by_leaf = {k.rpartition(".")[2]: k for k in reversed(candidates)}
        if found := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff):
            return by_leaf[found[0]]
    return None


def _join(problems: list[str]) -> str:
    return (
        problems[0] if len(problems) == 1 else "\n".join(["the settings have problems:", *(f"- {p}" for p in problems)])
    )
