"""`make demo`: the whole way from source text to a report, as a user would type it, in minutes on two cores."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from pretrain.refusal import run_or_refuse

DATA, RUN = Path("data/stdlib"), Path("runs/demo")
PROMPT = "def read_lines(path):\n"


def penumbra(*arguments: str) -> None:
    """Runs one command in a process of its own and shows it."""
    print(f"\n$ penumbra {shlex.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-m", "launchers.cli", *arguments]).returncode:
        raise ValueError(f"`penumbra {' '.join(arguments)}` did not succeed: see its message above")


def interrupted_training(after_step: int) -> None:
    """Trains, and kills the process once it has sealed a checkpoint at `after_step`."""
    print(f"\n$ penumbra train demo      # killed (-9) after the checkpoint of step {after_step}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "launchers.cli", "train", "demo"])
    sealed = RUN / "checkpoints" / f"step-{after_step:08d}"
    try:
        while process.poll() is None and not sealed.exists():
            time.sleep(0.05)
        time.sleep(1.0)
    finally:
        process.kill()
        process.wait()
    if not sealed.exists():
        raise ValueError("the first half of the training ended without a checkpoint: see its message above")


def main() -> None:
    """Tokenise, train, be killed, resume, measure, sample, score, report."""
    started = time.monotonic()
    if RUN.exists():
        raise ValueError(f"{RUN} exists: `rm -r {RUN}` removes it, or `penumbra train demo` continues it")
    if not DATA.exists():
        penumbra("tokenize", "stdlib", "--tokenizer", "bytes", "--out", str(DATA))
    interrupted_training(after_step=300)
    penumbra("train", "demo")
    penumbra("eval", str(RUN), "--task", "bound", "--num-draws", "2", "--limit", "128")
    penumbra(
        "sample", str(RUN), "--prompt", PROMPT, "--length", "192", "--steps", "96", "--amount", "ancestral", "--trace"
    )
    penumbra("eval", str(RUN), "--task", "demo_tasks")
    penumbra("report", str(RUN))
    print(f"\nDone in {time.monotonic() - started:.0f} s. What is where:")
    for path, what in (
        (DATA, "tokenised standard library: shards, tokenizer, manifest.json"),
        (RUN / "config.yaml", "the resolved configuration; `penumbra train runs/demo folder=runs/again` repeats it"),
        (RUN / "metrics.jsonl", "loss, bound, speed"),
        (RUN / "checkpoints", "sealed checkpoints"),
        (RUN / "evaluations", "bound and pass@1 with everything they depend on"),
        (RUN / "samples", "samples with their unmasking"),
        (RUN / "report.html", "all of it on one page"),
    ):
        print(f"  {path!s:<22} {what}")


if __name__ == "__main__":
    try:
        run_or_refuse(main)
    except KeyboardInterrupt:
        print(f"\ninterrupted: `penumbra train demo` goes on with {RUN}, and `rm -r {RUN}` makes room for a new demo")
        sys.exit(130)
