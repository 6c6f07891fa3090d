"""`penumbra sample`: prints samples, and keeps every frame of their unmasking for the report."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from eval.completion import Completion, Frame, complete
from eval.record import write_whole
from eval.sampling.settings import SamplingSettings
from pretrain.checkpoint.load import load_for_evaluation
from pretrain.writable import check_writable

STYLES = {"prompt": "dim", "masked": "bright_black", "new": "bold green", "known": ""}
NUM_TRACE_FRAMES = 6


def run_sample(
    folder: Path,
    prompt: str,
    num: int,
    settings: SamplingSettings,
    *,
    length: int | None,
    batch_size: int,
    trace: bool,
) -> None:
    """Samples from a run and writes RUN/samples/sample.json."""
    loaded = load_for_evaluation(folder)
    path = loaded.run / "samples" / "sample.json"
    check_writable(path)
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.checkpoint} has no tokenizer and can not write text")
    settings = settings.for_model(loaded.model.config)
    samples = complete(
        loaded.model,
        loaded.tokenizer,
        [prompt] * num,
        settings,
        length=length or loaded.length,
        batch_size=batch_size,
        record_frames=True,
    )
    console = Console(highlight=False, soft_wrap=True)
    for number, sample in enumerate(samples):
        console.rule(f"sample {number + 1} of {num}", align="left")
        if trace:
            _print_trace(console, sample)
        console.print(Text(sample.prompt, style=STYLES["prompt"]) + Text(sample.text))
    kept = [{"prompt": s.prompt, "text": s.text, "frames": s.frames} for s in samples]
    write_whole(path, json.dumps({"settings": {**asdict(settings), "prompt": prompt}, "samples": kept}))
    print(f"{num} sample(s) with their unmasking: {path}")


def _print_trace(console: Console, sample: Completion) -> None:
    """A few frames, evenly spaced, the newly revealed tokens in colour."""
    last = len(sample.frames) - 1
    shown = sorted({round(last * n / (NUM_TRACE_FRAMES - 1)) for n in range(NUM_TRACE_FRAMES)})
    for number in shown:
        console.print(Text(f"-- after {number} of {last} steps", style="cyan"))
        console.print(_render(sample.frames[number]))
    console.print(Text("-- the text, up to its end", style="cyan"))


def _render(frame: Frame) -> Text:
    text = Text()
    for token, kind in frame:
        text.append("\u2591" if kind == "masked" else token, style=STYLES[kind])
    return text
