"""Benchmarks: ours beside what a user would pick instead, in one process, medians of alternated repetitions."""

from pathlib import Path

from eval.record import Record
from pretrain.writable import check_writable


def run_benchmark(name: str, *, repeats: int, json_file: Path | None) -> None:
    """Runs one benchmark, prints it and writes the record where asked."""
    if json_file is not None:
        check_writable(json_file)
    if name == "head":
        from .head import SETTINGS, measure
    else:
        from .step import SETTINGS, measure
    record = Record({**SETTINGS, "repeats": repeats})
    results = measure(repeats)
    for key, value in results.items():
        print(f"{key:<36} {value:.4g}")
    record.write(results, json_file)
