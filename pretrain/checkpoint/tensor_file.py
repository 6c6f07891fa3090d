"""Safetensors files written one tensor at a time, so that a file may be larger than memory."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
ALIGNMENT = 8


def write_tensor_file(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """Writes the named tensors in their order, through to the disk.

    Args:
        shapes: of every tensor.
        dtype: float32 or bfloat16.
        read: gives a tensor of that shape and dtype, on the CPU; called once for each name, in order.
    """
    with path.open("wb") as file:
        file.write(_header(shapes, dtype))
        for name in shapes:
            file.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(shape) * dtype.itemsize


def _header(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> bytes:
    """Its own length, then JSON with the place of every tensor, filled up with blanks to a multiple of 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + num_bytes(shape, dtype)
        fields[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
