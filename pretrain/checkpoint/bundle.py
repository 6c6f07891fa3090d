"""The code that travels with exported weights: the files of model/ and eval/sampling/ themselves, in a flat folder."""

import re
from pathlib import Path

from .manifest import write_synced

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (ROOT / "model", ROOT / "eval" / "sampling")
MODELING = "modeling_penumbra"


def write_bundle(folder: Path) -> None:
    """Copies the code into a folder.

    transformers follows relative imports within one folder and no others, so what eval/sampling imports from model/
    becomes an import from a sibling.
    """
    for room in ROOMS:
        for path in sorted(room.glob("*.py")):
            if path.stem == "__init__":
                continue
            assert not (folder / path.name).exists(), f"{path.name} is in two rooms"
            write_synced(folder / path.name, _with_siblings(path.read_text(encoding="utf-8")))


def _with_siblings(source: str) -> str:
    return re.sub(r"^(\s*)from model\.(\w+) import", r"\1from .\2 import", source, flags=re.MULTILINE)
