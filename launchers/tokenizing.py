"""`penumbra tokenize` and `penumbra data`: progress on the terminal, and what a data set holds."""

from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.manifest import Manifest, open_tokenizer, verify
from data_pipeline.packing import ShardSource
from data_pipeline.tokenize import tokenize


def run_tokenize(
    source: str, *, tokenizer: str, out: Path, validation_fraction: float, seed: int, overwrite: bool
) -> None:
    """Tokenises a source and prints what is there now."""
    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=None)
        manifest = tokenize(
            source,
            tokenizer=tokenizer,
            out=out,
            validation_fraction=validation_fraction,
            seed=seed,
            overwrite=overwrite,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _summarise(out, manifest)


def run_verify(folder: Path) -> None:
    """Checks every hash; a damaged file is refused by name."""
    verify(folder)
    print(f"{folder}: every file is as its manifest says")


def run_inspect(folder: Path, rows: int, length: int) -> None:
    """Prints the manifest's counts and the first rows of the training split."""
    _summarise(folder, Manifest.load(folder))
    tokenizer = open_tokenizer(folder)
    source = ShardSource(folder, "train", length)
    gathered = source.gather(np.arange(min(rows, len(source))))
    for tokens, document in zip(gathered["tokens"].tolist(), gathered["document"].tolist(), strict=True):
        print(f"-- a row of {length} tokens from {document[-1] + 1} document(s)")
        print(tokenizer.decode(tokens, keep_special=True))


def _summarise(out: Path, manifest: Manifest) -> None:
    print(f"{out}: tokenizer {manifest.tokenizer.spec} with {manifest.tokenizer.vocab_size} tokens")
    for name, split in manifest.splits.items():
        print(f"  {name:<10} {split.num_documents:>9,} documents  {split.num_tokens:>13,} tokens")
    if manifest.num_duplicates or manifest.num_skipped:
        print(f"  left out: {manifest.num_duplicates} duplicates, {manifest.num_skipped} unreadable files")
