"""`penumbra tokenize`: progress on the terminal, and a summary of what was written."""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    print(f"{out}: tokenizer {manifest.tokenizer.spec} with {manifest.tokenizer.vocab_size} tokens")
    for name, split in manifest.splits.items():
        print(f"  {name:<10} {split.num_documents:>9,} documents  {split.num_tokens:>13,} tokens")
    if manifest.num_duplicates or manifest.num_skipped:
        print(f"  left out: {manifest.num_duplicates} duplicates, {manifest.num_skipped} unreadable files")
