"""Turns what the user can mend into one sentence and exit code 2; everything else keeps its traceback."""

import dis
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EXIT_REFUSED = 2
_ROOMS = {"pretrain", "data_pipeline", "model", "eval", "tools", "launchers"}


def run_or_refuse(command: Callable[[], None]) -> None:
    """Runs a command; a ValueError that our code raises itself ends it with its sentence on stderr and exit code 2."""
    try:
        command()
    except ValueError as error:
        if not _raised_here(error.__traceback__):
            raise
        print(f"penumbra: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


def _raised_here(traceback: TracebackType | None) -> bool:
    """Whether it comes from a `raise` statement in one of the project's rooms, not from what that code called."""
    root = Path(__file__).resolve().parents[1]
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    if code.co_code[traceback.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    path = Path(code.co_filename).resolve()
    return path.is_relative_to(root) and path.relative_to(root).parts[0] in _ROOMS
