"""Turns what the user can mend into one sentence and exit code 2; everything else keeps its traceback."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EXIT_REFUSED = 2
_ROOMS = {"pretrain", "data_pipeline", "model", "eval", "tools", "launchers"}


def run_or_refuse(command: Callable[[], None]) -> None:
    """Runs a command; a ValueError that our own code raised ends it with its sentence on stderr and exit code 2."""
    try:
        command()
    except ValueError as error:
        if not _raised_here(error.__traceback__):
            raise
        print(f"penumbra: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


def _raised_here(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame belongs to one of the project's rooms."""
    root = Path(__file__).resolve().parents[1]
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    path = Path(traceback.tb_frame.f_code.co_filename).resolve()
    return path.is_relative_to(root) and path.relative_to(root).parts[0] in _ROOMS
