"""How documents become rows of a fixed length.

Shapes: B rows of a batch, L tokens of a row, D documents of a split.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.manifest import Manifest, open_prompts, open_shards

Pack = Literal["concat", "pad"]
Int64Array = npt.NDArray[np.int64]
Rows = dict[str, torch.Tensor]


class Source(Protocol):
    """Samples by index: what the order permutes and the loader gathers."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def gather(self, indices: Int64Array) -> Rows:
        """Rows at indices [B], each below len().

        tokens [B, L] int64; maskable [B, L] bool; positions [B, L] int64, restarting at 0 in each document;
        document [B, L] int32, counted from 0 in each row, -1 at padding, left out where every row is one document.
        """
        ...


class ShardSource:
    """The rows of one split of a tokenised data set.

    pack: "concat" cuts the split's token stream in rows of `length` and drops the tail; "pad" gives each
    document a row of its own, cut at `length` or padded. Prompts and padding are
    not maskable. A document continued from the row before counts its positions from the start of the row.
    Raises ValueError when the split is missing, damaged or, with "concat", shorter than one row.
    """

    def __init__(self, folder: Path, split: str, length: int, *, pack: Pack = "concat") -> None:
        if length < 1:
            raise ValueError(f"the row length is {length}; give at least 1 token")
        if pack not in get_args(Pack):
            raise ValueError(f"unknown packing {pack!r}; legal: {', '.join(get_args(Pack))}")
        self.folder, self.split, self.length, self.pack = folder, split, length, pack
        self._shards = open_shards(folder, split)
        self._shard_starts = _starts(np.array([shard.num_tokens for shard in self._shards]))
        self._offsets = _starts(np.concatenate([shard.lengths for shard in self._shards]))
        self._prompts = open_prompts(folder, split).astype(np.int64)
        self._pad_id = Manifest.load(folder).tokenizer.pad_id
        self.num_documents = len(self._prompts)
        self.num_tokens = int(self._offsets[-1])
        if not len(self):
            raise ValueError(
                f"split {split!r} of {folder} has {self.num_tokens} tokens, fewer than one row of {length}; "
                f"set a row length of at most {self.num_tokens}, or tokenise more text"
            )

    def __reduce__(self) -> tuple[Callable[..., "ShardSource"], tuple[Path, str, int]]:
        return partial(ShardSource, pack=self.pack), (self.folder, self.split, self.length)

    def __len__(self) -> int:
        return self.num_tokens // self.length if self.pack == "concat" else self.num_documents

    def gather(self, indices: Int64Array) -> Rows:
        """Rows at indices [B]; see Source.gather."""
        rows = self._cut_stream(indices) if self.pack == "concat" else self._pad_documents(indices)
        return {name: torch.from_numpy(array) for name, array in rows.items()}

    def _cut_stream(self, rows: Int64Array) -> dict[str, npt.NDArray[np.generic]]:
        start_B1 = rows[:, None] * self.length
        place_BL = start_B1 + np.arange(self.length)
        document_BL = np.searchsorted(self._offsets, place_BL, side="right") - 1
        document_start_BL = self._offsets[document_BL]
        return {
            "tokens": self._read(start_B1[:, 0], np.full(len(rows), self.length)),
            "maskable": place_BL - document_start_BL >= self._prompts[document_BL],
            "document": (document_BL - document_BL[:, :1]).astype(np.int32),
            "positions": place_BL - np.maximum(document_start_BL, start_B1),
        }

    def _pad_documents(self, documents: Int64Array) -> dict[str, npt.NDArray[np.generic]]:
        start_B = self._offsets[documents]
        count_B = np.minimum(self._offsets[documents + 1] - start_B, self.length)
        position_BL = np.broadcast_to(np.arange(self.length), (len(documents), self.length))
        filled_BL = position_BL < count_B[:, None]
        return {
            "tokens": self._read(start_B, count_B),
            "maskable": filled_BL & (position_BL >= self._prompts[documents][:, None]),
            "document": np.where(filled_BL, 0, -1).astype(np.int32),
            "positions": np.where(filled_BL, position_BL, 0),
        }

    def _read(self, start_B: Int64Array, count_B: Int64Array) -> Int64Array:
        """Tokens of B stretches of the stream, padded to [B, L]; a stretch may run over several shards."""
        tokens_BL = np.full((len(start_B), self.length), self._pad_id, np.int64)
        for row, (start, count) in enumerate(zip(start_B.tolist(), count_B.tolist(), strict=True)):
            done = 0
            while done < count:
                shard = int(np.searchsorted(self._shard_starts, start + done, side="right")) - 1
                within = start + done - int(self._shard_starts[shard])
                piece = self._shards[shard].tokens(within, within + count - done)
                tokens_BL[row, done : done + len(piece)] = piece
                done += len(piece)
        return tokens_BL


def _starts(lengths: Int64Array) -> Int64Array:
    """Where each of a chain of lengths starts, then the end of the chain."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
