"""The weights of a sealed checkpoint as safetensors files, divided among the ranks and read tensor by tensor."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from model.config import ModelConfig
from model.diffusion import MaskedDiffusion

from ..parallel.mesh import Axis
from .tensor_file import num_bytes, write_tensor_file

PREFIX = "model."
"""Of every name in the files: the attribute that holds the model in its transformers class."""
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class WeightFiles:
    """Which tensors go into which file.

    Args:
        group: what is read from the checkpoint, model or ema.
        dtype: of every tensor.
        files: shapes by name by file.
    """

    group: str
    dtype: torch.dtype
    files: dict[str, Shapes]

    @classmethod
    def plan(cls, model: ModelConfig, group: str, dtype: torch.dtype, max_bytes: int) -> "WeightFiles":
        """Files of at most `max_bytes` of tensors each, or of one tensor that is larger, in the model's own order."""
        with torch.device("meta"):
            shapes = {f"{PREFIX}{name}": tuple(p.shape) for name, p in MaskedDiffusion(model).named_parameters()}
        parts = list(_parts(shapes, dtype, max_bytes))
        names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
        return cls(group, dtype, dict(zip(names, parts, strict=True)))

    def index(self) -> dict[str, Any]:
        """What model.safetensors.index.json says."""
        total = sum(num_bytes(shape, self.dtype) for shapes in self.files.values() for shape in shapes.values())
        places = {name: file for file, shapes in self.files.items() for name in shapes}
        return {"metadata": {"total_size": total}, "weight_map": places}

    def write(self, tensors: Path, folder: Path, world: Axis, before_each: Callable[[], None]) -> None:
        """Writes this rank's share of the files.

        Args:
            tensors: the DCP folder of the checkpoint.
            folder: where the files go.
            before_each: called before every tensor; what it raises ends the work.
        """
        source = _Reader(tensors)

        def read(name: str) -> Tensor:
            before_each()
            return source.tensor(f"{self.group}.{name.removeprefix(PREFIX)}", shapes[name], self.dtype)

        for file, shapes in list(self.files.items())[world.rank :: world.size]:
            write_tensor_file(folder / file, shapes, self.dtype, read)


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once: they grow with the number of processes that wrote the checkpoint."""

    def __init__(self, tensors: Path) -> None:
        super().__init__(tensors)
        self.metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def tensor(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One whole tensor, whoever held its shards."""
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist asks for
        tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        try:
            dcp.load({key: tensor}, storage_reader=self, no_dist=True)
        except CheckpointException as error:  # which is no Exception
            cause, _ = next(iter(error.failures.values()))
            raise cause from error
        return tensor


def _parts(shapes: Shapes, dtype: torch.dtype, max_bytes: int) -> Iterator[Shapes]:
    part: dict[str, Sequence[int]] = {}
    size = 0
    for name, shape in shapes.items():
        here = num_bytes(shape, dtype)
        if part and size + here > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += here
    yield part
