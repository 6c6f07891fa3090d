"""Toy functions as rows: the prompt is given, the body and the end tokens up to the row's end are to be written."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.packing import Rows
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.toy_functions.corpus import ToyFunction


class ToyFunctionSource:
    """One function per row of `length` tokens.

    Raises:
        ValueError: no functions, or one that is longer than the row.
    """

    def __init__(self, functions: Sequence[ToyFunction], tokenizer: Tokenizer, length: int) -> None:
        if not functions:
            raise ValueError("there are no toy functions to train on or hold out: set data.num_held_out to at least 1")
        prompts = tokenizer.encode_batch([f.prompt for f in functions])
        bodies = tokenizer.encode_batch([f.body for f in functions])
        longest = max(len(p) + len(b) + 1 for p, b in zip(prompts, bodies, strict=True))
        if longest > length:
            raise ValueError(
                f"the longest toy function has {longest} tokens: set data.length to at least that, not {length}"
            )
        self.tokens_NL = np.full((len(functions), length), tokenizer.end_id, dtype=np.int32)
        self.prompt_N = np.array([len(p) for p in prompts], dtype=np.int32)
        for row, (prompt, body) in enumerate(zip(prompts, bodies, strict=True)):
            self.tokens_NL[row, : len(prompt) + len(body)] = prompt + body

    def __len__(self) -> int:
        return len(self.tokens_NL)

    def gather(self, indices: npt.NDArray[np.int64]) -> Rows:
        """Rows by index; see Source."""
        tokens = torch.from_numpy(self.tokens_NL[indices].astype(np.int64))
        prompt = torch.from_numpy(self.prompt_N[indices])
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return {
            "tokens": tokens,
            "maskable": positions >= prompt[:, None],
            "positions": positions,
        }
