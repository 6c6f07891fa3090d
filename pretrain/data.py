"""Opens what a run trains on: sources of rows, and the tokenizer that made them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.packing import ShardSource, Source
from data_pipeline.tokenizers import Tokenizer

from .config import DataConfig, PrepareConfig, ShardData, ToyFunctionsData
from .parallel.mesh import DataAxis

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from data_pipeline.toy_functions import ToyCorpus


@dataclass(frozen=True)
class Data:
    """Training rows, held-out rows (None without a validation split), and the tokenizer."""

    train: Source
    validation: Source | None
    tokenizer: Tokenizer


def open_data(config: DataConfig, axis: DataAxis) -> Data:
    """The data of a configuration; shards that can be prepared are made first, by rank 0."""
    if isinstance(config, ToyFunctionsData):
        return _open_toy_functions(config)
    return _open_shards(config, axis)


def _open_shards(config: ShardData, axis: DataAxis) -> Data:
    from data_pipeline.manifest import Manifest, open_tokenizer

    folder = Path(config.path)
    if config.prepare is not None:
        if axis.rank == 0 and not folder.exists():
            _prepare(config.prepare, folder)
        axis.barrier()
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


def toy_corpus(config: ToyFunctionsData) -> "ToyCorpus":
    """The functions of a configuration, training and held out."""
    from data_pipeline.toy_functions import build_corpus

    return build_corpus(
        num_trees=config.num_trees,
        variants=config.variants,
        held_out_fraction=config.num_held_out / config.num_trees,
        seed=config.seed,
    )
