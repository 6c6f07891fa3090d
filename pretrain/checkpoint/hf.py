"""Hugging Face folders: a sealed checkpoint as safetensors, config, tokenizer, code and model card."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed.checkpoint as dcp

from data_pipeline.tokenizers import END, MASK, PAD, Tokenizer
from model.config import ModelConfig

from ..parallel.mesh import Axis
from ..state import TrainState
from .agreement import on_every_rank, on_first_rank
from .bundle import MODELING, write_bundle
from .load import best_group, read_model_config, read_state
from .manifest import sync_folder, write_synced
from .model_card import RunRecord, model_card
from .save import TENSORS
from .verify import ALONE
from .weights import WeightFiles

DtypeName = Literal["fp32", "bf16"]
WeightsName = Literal["ema", "raw"]
DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_FILE_BYTES = 4 * 10**9
UNFINISHED, REPLACED = ".exporting", ".replaced"
"""Endings of folders beside the export's place: one that is not whole, and one that was in its place."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How a checkpoint is exported.

    Args:
        dtype: of the weights in the files.
        weights: None: the averaged ones, where the run keeps them.
        max_file_bytes: of tensors in one file, unless a tensor alone is larger.
    """

    dtype: DtypeName = "fp32"
    weights: WeightsName | None = None
    max_file_bytes: int = MAX_FILE_BYTES

    def __post_init__(self) -> None:
        for name, value, legal in (("dtype", self.dtype, DtypeName), ("weights", self.weights, WeightsName)):
            if value is not None and value not in get_args(legal):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(legal))}")


def export(
    checkpoint: Path,
    out: Path,
    settings: ExportSettings,
    world: Axis = ALONE,
    *,
    before_each: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint as a Hugging Face folder, in place of an earlier one; every rank calls it.

    Each rank writes its share of the weights and holds one tensor at a time; rank 0 adds the rest, and the name.

    Args:
        checkpoint: a sealed one, which nobody removes meanwhile.
        before_each: called before every tensor; what it raises ends the export.

    Raises:
        ValueError: the run keeps no averaged weights.
        OSError, RuntimeError: it failed on a rank; said on all of them, and nothing of it is left.
    """
    content = on_every_rank(world, lambda: _Content.of(checkpoint, settings))[world.rank]
    unfinished = out.with_name(out.name + UNFINISHED)

    def complete() -> None:
        _write_small_files(unfinished, content)
        _publish(unfinished, out)

    try:
        on_first_rank(world, lambda: _start(unfinished))
        on_every_rank(world, lambda: content.weights.write(checkpoint / TENSORS, unfinished, world, before_each))
        on_first_rank(world, complete)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return out


@dataclass(frozen=True)
class _Content:
    """What a folder is made of."""

    model: ModelConfig
    state: TrainState
    weights: WeightFiles
    tokenizer: Path | None
    run: RunRecord

    @classmethod
    def of(cls, checkpoint: Path, settings: ExportSettings) -> "_Content":
        model, state = read_model_config(checkpoint), read_state(checkpoint)
        group = weights_group(checkpoint, settings.weights)
        weights = WeightFiles.plan(model, group, DTYPES[settings.dtype], settings.max_file_bytes)
        tokenizer = checkpoint / "tokenizer" / "tokenizer.json"
        run = RunRecord.of(checkpoint, state.step)
        return cls(model, state, weights, tokenizer if tokenizer.is_file() else None, run)


def weights_group(checkpoint: Path, weights: WeightsName | None) -> str:
    """Where a checkpoint has the weights that are asked for.

    Raises:
        ValueError: it has no averaged ones.
    """
    group = best_group(dcp.FileSystemReader(checkpoint / TENSORS).read_metadata().state_dict_metadata)
    if weights == "ema" and group != "ema":
        raise ValueError(
            f"{checkpoint} has no averaged weights (train.ema_decay=0): export those as trained, with --weights raw"
        )
    return "model" if weights == "raw" else group


def _start(unfinished: Path) -> None:
    """An empty folder."""
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)


def _write_small_files(folder: Path, content: _Content) -> None:
    """Everything but the weights themselves."""
    tokenizer = None if content.tokenizer is None else Tokenizer.load(content.tokenizer)
    length = int(content.state.identity.get("data.length", 0))
    _write_json(folder / "model.safetensors.index.json", content.weights.index())
    _write_json(folder / "config.json", _config(content, None if tokenizer is None else tokenizer.end_id, length))
    if content.tokenizer is not None:
        _write_tokenizer(folder, json.loads(content.tokenizer.read_text(encoding="utf-8")), length)
    write_bundle(folder)
    card = model_card(
        content.model,
        content.state,
        content.run,
        weights="averaged (EMA)" if content.weights.group == "ema" else "as trained, not averaged",
        dtype=_name(content.weights.dtype),
        has_tokenizer=tokenizer is not None,
    )
    write_synced(folder / "README.md", card)


def _config(content: _Content, end_id: int | None, length: int) -> dict[str, Any]:
    """config.json; the mask token is in the model's own settings."""
    return {
        "architectures": ["PenumbraModel"],
        "model_type": "penumbra",
        "auto_map": {"AutoConfig": f"{MODELING}.PenumbraConfig", "AutoModel": f"{MODELING}.PenumbraModel"},
        "dtype": _name(content.weights.dtype),
        "length": length,
        "eos_token_id": end_id,
        "model": asdict(content.model),
    }


def _write_tokenizer(folder: Path, backend: dict[str, Any], length: int) -> None:
    """As training used it: nothing added to a text or cut from it, and special tokens in a text are plain text."""
    _write_json(folder / "tokenizer.json", {**backend, "post_processor": None, "truncation": None, "padding": None})
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "pad_token": PAD,
        "eos_token": END,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids"],
        "model_max_length": length,
    }
    _write_json(folder / "tokenizer_config.json", about)


def _publish(unfinished: Path, out: Path) -> None:
    """Gives the folder its name, in place of one that may have it; at no moment does half a folder have it."""
    sync_folder(unfinished)
    replaced = out.with_name(out.name + REPLACED)
    if replaced.exists():
        shutil.rmtree(replaced)
    if out.exists():
        out.rename(replaced)
    unfinished.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_synced(path, json.dumps(tree, indent=1, ensure_ascii=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
