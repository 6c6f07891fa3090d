"""Which version of the code this is."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the checkout this code runs from, with a mark if it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    return answer.stdout.strip() or None
