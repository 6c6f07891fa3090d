"""Damage to a checkpoint on disk: a flipped bit, a file that is cut off."""

from pathlib import Path


def damage_file(checkpoint: Path, how: str, file: float, position: float) -> Path:
    """Damages one file of a checkpoint in place and returns it.

    Args:
        how: bit-flip, or truncation, after which less than the whole file is left.
        file: which of its files, in [0, 1), each as likely as another.
        position: where in the file, in [0, 1).
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = files[int(file * len(files))]
    content = bytearray(chosen.read_bytes())
    bit = int(position * 8 * len(content))
    if how == "truncation":
        content = content[: bit // 8]
    else:
        content[bit // 8] ^= 1 << bit % 8
    chosen.write_bytes(content)
    return chosen
