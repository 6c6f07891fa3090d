"""Sentences about a run that goes on, on stderr."""

import contextlib
import sys


def notice(text: str) -> None:
    """Says it; where stderr is a file on a disk that is full, it is lost."""
    with contextlib.suppress(OSError):
        print(f"penumbra: {text}", file=sys.stderr, flush=True)
