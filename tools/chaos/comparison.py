"""Whether two runs are the same to the last bit: every line of the loss trace, the weights, where they stand."""

import struct
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from pretrain.checkpoint.load import CHECKPOINTS, read_state
from pretrain.checkpoint.manifest import sealed_in
from pretrain.hooks.metrics import read_metrics

CLOCKS = {"kind", "step", "seconds", "processor_seconds", "tokens_per_second", "mfu", "peak_memory"}
"""What a line says of time and memory, which no two runs share."""
MOST_NAMED = 5
Point = tuple[str, int, str]
"""Kind of a line (or "state", of what a checkpoint says of the run), step, name of a number."""


def differences(run: Path, reference: Path, *, apart_from: Iterable[Point] = ()) -> list[str]:
    """What a run has otherwise than its reference, one sentence each; none where they are identical.

    Every line counts, also that of a step which was repeated after a resume.

    Args:
        apart_from: what is not compared.
    """
    checkpoints = [newest_checkpoint(folder) for folder in (run, reference)]
    ours, theirs = ([*_logged(folder), *_state(path)] for folder, path in zip((run, reference), checkpoints))
    told = number_differences(ours, theirs, apart_from)
    if None in checkpoints:
        return [*told, "there is no checkpoint to compare"]
    return [*told, *tensor_differences(*(read_tensors(path) for path in checkpoints if path is not None))]


def number_differences(
    ours: Iterable[tuple[Point, Any]], theirs: Iterable[tuple[Point, Any]], apart_from: Iterable[Point] = ()
) -> list[str]:
    """Numbers that differ in a bit, and those that only one side has; a point may come up more than once."""
    there, left_out, seen = dict(theirs), set(apart_from), set()
    told = []
    for point, value in ours:
        seen.add(point)
        if point not in there:
            told.append(f"{_named(point)} is {value!r}, and is not in the reference")
        elif point not in left_out and _bits(value) != _bits(there[point]):
            told.append(f"{_named(point)} is {_shown(value)}, in the reference {_shown(there[point])}")
    told += [f"{_named(point)} is missing" for point in there if point not in seen]
    return _shortened(told)


def tensor_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Tensors that differ in a bit, in shape, or that only one side has."""
    told = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            told.append(f"{name} is only in {'the reference' if name in theirs else 'the run'}")
        elif ours[name].shape != theirs[name].shape or ours[name].dtype != theirs[name].dtype:
            told.append(f"{name} has another shape or type")
        else:
            count = int((_words(ours[name]) != _words(theirs[name])).sum())
            if count:
                told.append(f"{name} differs in {count} of {ours[name].numel()} numbers")
    return _shortened(told)


def newest_checkpoint(run: Path) -> Path | None:
    """The folder with the highest step, without a look inside."""
    return max(sealed_in(run / CHECKPOINTS), default=None)


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, both moments and averaged weights of a checkpoint, whole, by group and name."""
    reader = dcp.FileSystemReader(checkpoint / "tensors")
    described = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        for name, about in described.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what no_dist asks for
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _state(checkpoint: Path | None) -> Iterable[tuple[Point, Any]]:
    state = {} if checkpoint is None else asdict(read_state(checkpoint))
    return [(("state", state["step"], name), state[name]) for name in state if name != "resumes"]


def _logged(run: Path) -> Iterable[tuple[Point, Any]]:
    for line in read_metrics(run / "metrics.jsonl"):
        if line["kind"] in ("train", "validation"):
            yield from (((line["kind"], line["step"], key), line[key]) for key in line if key not in CLOCKS)


def _bits(value: Any) -> Any:
    return struct.pack("<d", value) if isinstance(value, float) else value


def _words(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def _shown(value: Any) -> str:
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)


def _named(point: Point) -> str:
    kind, step, name = point
    return f"step {step}: {kind} {name}"


def _shortened(sentences: list[str]) -> list[str]:
    more = len(sentences) - MOST_NAMED
    return sentences if more <= 0 else [*sentences[:MOST_NAMED], f"and {more} more"]
