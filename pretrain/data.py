"""Opens what a run trains on: sources of rows, and the tokenizer that made them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.packing import ShardSource, Source
from data_pipeline.tokenizers import Tokenizer

from .data_config import DataConfig, PatternData, PointData, PrepareConfig, ShardData, SudokuData, ToyFunctionsData
from .parallel.mesh import Axis

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from data_pipeline.toy_functions import ToyCorpus


HELD_OUT_SEED = 1
HELD_OUT_ROWS = 10_000


@dataclass(frozen=True)
class Data:
    """Training rows, held-out rows (None without a validation split), and the tokenizer."""

    train: Source
    validation: Source | None
    tokenizer: Tokenizer


def open_data(config: DataConfig, world: Axis) -> Data:
    """The data of a configuration; shards that can be prepared are made first, by rank 0."""
    if isinstance(config, ToyFunctionsData):
        return _open_toy_functions(config)
    if isinstance(config, PatternData | PointData | SudokuData):
        return _open_values(config)
    return _open_shards(config, world)


def _open_shards(config: ShardData, world: Axis) -> Data:
    from data_pipeline.manifest import Manifest, open_tokenizer

    folder = Path(config.path)
    if config.prepare is not None:
        if world.rank == 0:
            _prepare_once(config.prepare, folder)
        world.barrier()
    manifest = Manifest.load(folder)
    if config.prepare is not None:
        _refuse_other_data(config.prepare, manifest, folder)
    tokenizer = open_tokenizer(folder)
    has_validation = manifest.splits["validation"].num_documents > 0
    validation = ShardSource(folder, "validation", config.length, pack=config.pack) if has_validation else None
    return Data(ShardSource(folder, "train", config.length, pack=config.pack), validation, tokenizer)


def _refuse_other_data(wanted: PrepareConfig, found: "Manifest", folder: Path) -> None:
    there = PrepareConfig(
        source=found.source, tokenizer=found.tokenizer.spec, validation_fraction=found.validation_fraction
    )
    if there != wanted:
        raise ValueError(
            f"{folder} was made from {there.source} ({there.tokenizer}, {there.validation_fraction} held out), "
            f"not from {wanted.source} ({wanted.tokenizer}, {wanted.validation_fraction} held out): "
            "set data.prepare=null to use it as it is, or give data.path another name"
        )


def _prepare_once(config: PrepareConfig, folder: Path) -> None:
    """Runs that start side by side wait for the one that tokenises."""
    from filelock import FileLock

    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                _prepare(config, folder)
    except OSError as error:
        raise ValueError(f"data.path={folder} can not be made ({error}): give a folder that can be written") from None


def _prepare(config: PrepareConfig, folder: Path) -> None:
    from data_pipeline.tokenize import tokenize

    print(f"preparing {folder} from {config.source} ({config.tokenizer})", flush=True)
    tokenize(config.source, tokenizer=config.tokenizer, out=folder, validation_fraction=config.validation_fraction)


def _open_toy_functions(config: ToyFunctionsData) -> Data:
    from data_pipeline.tokenizers import make_tokenizer
    from data_pipeline.toy_functions.source import ToyFunctionSource

    corpus = toy_corpus(config)
    texts = [function.prompt + function.body for function in corpus.train]
    tokenizer = make_tokenizer(f"bpe:{config.vocab_size}", lambda: iter(texts))
    train = ToyFunctionSource(corpus.train, tokenizer, config.length)
    return Data(train, ToyFunctionSource(corpus.held_out, tokenizer, config.length), tokenizer)


def _open_values(config: PatternData | PointData | SudokuData) -> Data:
    """Rows of small integers; training and held-out rows are drawn with different seeds."""
    from data_pipeline.sudoku import SudokuSource
    from data_pipeline.synthetic import NUM_BINS, NUM_DIGITS, PatternSource, PointSource
    from data_pipeline.tokenizers import value_tokenizer

    if isinstance(config, SudokuData):
        size, family, num_rows = config.size, config.family, config.num_rows
        train = SudokuSource(size, family, "train", num_rows=num_rows)
        return Data(train, SudokuSource(size, family, "validation", num_rows=HELD_OUT_ROWS), value_tokenizer(size))
    if isinstance(config, PointData):
        held_out: Source = PointSource(config.toy, seed=HELD_OUT_SEED, num_rows=HELD_OUT_ROWS)
        return Data(PointSource(config.toy, num_rows=config.num_rows), held_out, value_tokenizer(NUM_BINS))
    patterns = [
        PatternSource(config.toy, length=config.length, dependence=config.dependence, seed=seed, num_rows=num_rows)
        for seed, num_rows in ((0, config.num_rows), (HELD_OUT_SEED, HELD_OUT_ROWS))
    ]
    return Data(patterns[0], patterns[1], value_tokenizer(NUM_DIGITS))


def toy_corpus(config: ToyFunctionsData) -> "ToyCorpus":
    """The functions of a configuration, training and held out."""
    from data_pipeline.toy_functions import build_corpus

    return build_corpus(
        num_trees=config.num_trees,
        variants=config.variants,
        held_out_fraction=config.num_held_out / config.num_trees,
        seed=config.seed,
    )
