"""`penumbra export`: one checkpoint of a run as a folder that transformers loads."""

from pathlib import Path

from pretrain.checkpoint.hf import ExportSettings, export, weights_group
from pretrain.checkpoint.load import CHECKPOINTS, locate
from pretrain.checkpoint.manifest import MANIFEST, sealed_in
from pretrain.checkpoint.save import checkpoint_name
from pretrain.writable import check_writable


def run_export(run: Path, out: Path, step: int | None, settings: ExportSettings) -> None:
    """Exports and says what there is now."""
    if out.exists():
        raise ValueError(f"{out} exists: choose another place, or remove it first")
    check_writable(out)
    checkpoint = locate(run if step is None else _of_step(run, step))
    kind = "averaged weights" if weights_group(checkpoint, settings.weights) == "ema" else "weights as trained"
    try:
        export(checkpoint, out, settings)
    except OSError as error:
        raise ValueError(
            f"nothing was exported to {out} ({error}): make room or mend it, or choose another place"
        ) from None
    print(f"exported {checkpoint} ({kind}, {settings.dtype}) to {out}")
    if not (checkpoint / "tokenizer").is_dir():
        print("the checkpoint has no tokenizer, so the folder has none: the model reads and writes token ids")


def _of_step(run: Path, step: int) -> Path:
    found = run / CHECKPOINTS / checkpoint_name(step)
    if (run / MANIFEST).is_file():
        raise ValueError(
            f"--step {step} chooses among the checkpoints of a run, and {run} is a checkpoint: drop --step"
        )
    if not found.is_dir():
        sealed = sealed_in(run / CHECKPOINTS)
        there = ", ".join(str(int(path.name.removeprefix("step-"))) for path in sealed) or "none"
        raise ValueError(f"{run} has no checkpoint of step {step}, only of these: {there}")
    return found
