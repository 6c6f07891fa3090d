"""What a run trains on: shards on disk, or one of the generators, by kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from model.config import Settings


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Settings):
    """How to make the shards when they are not there: what `penumbra tokenize` takes."""

    source: str
    """A folder, a .txt, .py or .jsonl file, or `stdlib`."""
    tokenizer: str = "bpe:4096"
    """bytes, characters, bpe:SIZE, or a tokenizer.json."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by their hash."""


@dataclass(frozen=True, kw_only=True)
class ShardData(Settings):
    """Tokenised documents on disk."""

    kind: Literal["shards"] = "shards"
    """Rows from Megatron shards."""
    path: str
    """Folder written by `penumbra tokenize`."""
    length: int = 256
    """Positions per row, L."""
    pack: Literal["concat", "pad"] = "concat"
    """concat: rows are cut from the stream of documents; pad: one document per row."""
    num_workers: int = 1
    """Prefetching processes per rank; 0 loads in the training process."""
    prepare: PrepareConfig | None = None
    """Makes the shards on first use."""


@dataclass(frozen=True, kw_only=True)
class ToyFunctionsData(Settings):
    """Small Python functions from a generator; only their bodies are masked."""

    kind: Literal["toy_functions"] = "toy_functions"
    """Rows from the generator."""
    length: int = 96
    """Positions per row, L: prompt, body, and end tokens up to L."""
    num_trees: int = 12_000
    """Distinct syntax trees, held-out ones included."""
    num_held_out: int = 400
    """Trees kept for evaluation, none of which occurs in training."""
    variants: int = 4
    """Functions per training tree, with other names and constants."""
    vocab_size: int = 1024
    """Size of the byte-level BPE trained on the training functions."""
    seed: int = 0
    """Seed of the generator."""
    num_workers: int = 1
    """Prefetching processes per rank; 0 loads in the training process."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        for name, least in (("num_trees", 2), ("variants", 1), ("vocab_size", 259)):
            if getattr(self, name) < least:
                yield f"data.{name}={getattr(self, name)} must be at least {least}"
        most = self.num_trees - 1
        if most > 0 and not 1 <= self.num_held_out <= most:
            yield f"data.num_held_out={self.num_held_out} must lie between 1 and {most} (data.num_trees - 1)"


@dataclass(frozen=True, kw_only=True)
class PatternData(Settings):
    """Rows from a small set of digit patterns whose probabilities are known (VMD Sections 4.1, 4.2, Appendix D.2)."""

    kind: Literal["patterns"] = "patterns"
    """Rows from a known set of patterns."""
    toy: Literal["deterministic", "non_uniform", "dependence", "d1", "d2", "needle"] = "deterministic"
    """Pairs (k, k+1), uniform, non-uniform or dependent with probability `dependence`; four tokens; a needle."""
    length: int = 2
    """Positions per row, L: 2, 4, or for the needle at least 8."""
    dependence: float | None = None
    """With toy=dependence: the probability that the second digit follows the first."""
    num_rows: int = 1_000_000
    """Rows, each drawn anew from the distribution."""
    num_workers: int = 0
    """Prefetching processes per rank; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class PointData(Settings):
    """Points of the plane in 100 bins per dimension (VADD Appendix B.1)."""

    kind: Literal["points"] = "points"
    """Points of the plane."""
    toy: Literal["checkerboard", "swissroll", "circles"] = "checkerboard"
    """Which distribution."""
    num_rows: int = 100_000
    """Size of the training set."""
    num_workers: int = 0
    """Prefetching processes per rank; 0 loads in the training process."""

    @property
    def length(self) -> int:
        """Positions per row, L: two dimensions."""
        return 2


@dataclass(frozen=True, kw_only=True)
class SudokuData(Settings):
    """Sudoku grids whose clues are visible and whose other cells are masked."""

    kind: Literal["sudoku"] = "sudoku"
    """Sudoku grids."""
    size: Literal[4, 6] = 4
    """Cells of a row, column and box."""
    family: Literal["unique", "few_clues"] = "unique"
    """Puzzles with one solution, or with so few clues that there are many."""
    num_rows: int = 100_000
    """Training puzzles."""
    num_workers: int = 0
    """Prefetching processes per rank; 0 loads in the training process."""

    @property
    def length(self) -> int:
        """Positions per row, L: the cells."""
        return self.size**2


DataConfig = Annotated[ShardData | ToyFunctionsData | PatternData | PointData | SudokuData, Field(discriminator="kind")]
