"""Benchmarks: ours beside what a user would pick instead, in one process, medians of alternated repetitions."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from eval.record import Record
from pretrain.writable import check_writable


def run_benchmark(name: str, *, repeats: int, json_file: Path | None) -> None:
    """Runs one benchmark, prints it and writes the record where asked."""
    if json_file is not None:
        check_writable(json_file)
    benchmark = import_module(f".{name}", __name__)
    record = Record({**benchmark.SETTINGS, "repeats": repeats})
    results = benchmark.measure(repeats)
    print(getattr(benchmark, "as_table", _as_lines)(results))
    record.write(results, json_file)


def _as_lines(results: Mapping[str, float]) -> str:
    return "\n".join(f"{key:<36} {value:.4g}" for key, value in results.items())
