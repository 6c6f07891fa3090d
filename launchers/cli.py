"""The `penumbra` command: parse, call one room, print. Heavy imports happen inside the commands."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.refusal import run_or_refuse

from .options import with_sampling

if TYPE_CHECKING:
    from eval.sampling.settings import SamplingSettings

app = typer.Typer(
    name="penumbra",
    help="Pretrains masked diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

RunFolder = Annotated[
    Path, typer.Argument(help="A run folder such as runs/demo, or one of its checkpoints/step-N.", metavar="RUN")
]
RecipeName = Annotated[str, typer.Argument(help="A recipe's name, or a run's config.yaml.", metavar="RECIPE|CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings by dotted name, for example optim.lr=3e-4 (`penumbra recipes RECIPE` lists all).",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the measurement to this file.", metavar="FILE")
]


Length = Annotated[
    int | None, typer.Option(help="Canvas in tokens, prompt included.", min=1, show_default="the trained length")
]
BatchSize = Annotated[int, typer.Option(help="Rows at once; bounds the memory and changes no result.", min=1)]


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every setting of this recipe.", metavar="RECIPE")] = None,
) -> None:
    """List the recipes, or print all settings of one with their meanings."""
    from .describe import describe_recipe, list_recipes

    print(list_recipes() if name is None else describe_recipe(name))


@app.command()
def tokenize(
    source: Annotated[
        str, typer.Argument(help="A folder, a .txt, .py or .jsonl file, or `stdlib` (this Python's own library).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for shards, tokenizer and manifest.")],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, characters, bpe:SIZE (trained on the source), or a tokenizer.json.")
    ] = "bpe:4096",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents held out, chosen by their hash.", min=0.0, max=0.99)
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is there.")] = False,
) -> None:
    """Turn text into shards that training reads (Megatron .bin/.idx with a manifest)."""
    from .tokenizing import run_tokenize

    run_tokenize(
        source,
        tokenizer=tokenizer,
        out=out,
        validation_fraction=validation_fraction,
        seed=seed,
        overwrite=overwrite,
    )


data_app = typer.Typer(help="Look into a tokenised data set, or check every hash of it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
DataFolder = Annotated[Path, typer.Argument(help="A folder written by `penumbra tokenize`.", metavar="DIR")]


@data_app.command()
def verify(folder: DataFolder) -> None:
    """Recompute the sha256 of every file."""
    from .tokenizing import run_verify

    run_verify(folder)


@data_app.command()
def inspect(
    folder: DataFolder,
    rows: Annotated[int, typer.Option(help="How many rows to show.", min=0)] = 2,
    length: Annotated[int, typer.Option(help="Positions per row.", min=1)] = 128,
) -> None:
    """Print what a data set holds, and some of its rows with their document boundaries."""
    from .tokenizing import run_inspect

    run_inspect(folder, rows, length)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a recipe, from its newest good checkpoint if there is one.

    SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C and train.time_limit_minutes save a checkpoint and end the run.

    Exit codes: 0 finished; 75 stopped with a checkpoint: the same command goes on; 70 a spike in the gradient
    (train.on_spike); 71 stalled (train.watchdog_minutes); 2 a mistake in the settings; 1 any other error.
    """
    from pretrain.settings import dump_config
    from pretrain.train import resolve
    from pretrain.train import train as run_training

    config = resolve(recipe, overrides or [])
    if dry_run:
        print(dump_config(config), end="")
    else:
        raise typer.Exit(run_training(config))


class PlannedGpu(StrEnum):
    """GPUs that `penumbra plan` knows."""

    a100_80 = "a100-80"
    h100 = "h100"
    h200 = "h200"


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each, and processes.", min=1)] = 8,
    gpu: Annotated[PlannedGpu, typer.Option(help="Their kind.", case_sensitive=False)] = PlannedGpu.a100_80,
    json: JsonFile = None,
) -> None:
    """Say whether a run fits on GPUs that are not here, and predict its speed: memory, traffic, days.

    Exit code 0: it fits; 1: it does not, and what to change is printed.
    """
    from pretrain.train import resolve
    from tools.plan import run_plan

    planned = run_plan(
        resolve(recipe, overrides or []), gpu.value, nodes=nodes, gpus_per_node=gpus_per_node, json_file=json
    )
    raise typer.Exit(0 if planned.fits else 1)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, for example runs/demo.", metavar="RUN")],
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Watch a run: loss and bound, speed, time left, where the time goes, checkpoints, lagging ranks."""
    from .watch import run_watch

    run_watch(run, every=every, once=once)


@app.command()
@with_sampling(temperature=1.0)
def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    num: Annotated[int, typer.Option(help="How many samples.", min=1)] = 1,
    length: Length = None,
    batch_size: BatchSize = 32,
    trace: Annotated[bool, typer.Option("--trace", help="Print the text at several steps of its unmasking.")] = False,
    *,
    sampling: "SamplingSettings",
) -> None:
    """Sample from a run; the unmasking is kept in RUN/samples for the report."""
    from .sampling import run_sample

    run_sample(run, prompt, num, sampling, length=length, batch_size=batch_size, trace=trace)


class ExportDtype(StrEnum):
    """Numbers in the files of an export."""

    fp32 = "fp32"
    bf16 = "bf16"


class ExportWeights(StrEnum):
    """Which weights are exported."""

    ema = "ema"
    raw = "raw"


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.", metavar="OUT")],
    step: Annotated[
        int | None, typer.Option(help="Export the checkpoint of this step.", min=0, show_default="the newest good one")
    ] = None,
    dtype: Annotated[
        ExportDtype, typer.Option(help="fp32: the weights as the checkpoint has them; bf16: half the size.")
    ] = ExportDtype.fp32,
    weights: Annotated[
        ExportWeights | None,
        typer.Option(help="Averaged weights, or as trained.", show_default="ema where the run keeps them"),
    ] = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads: weights, config, tokenizer, code, model card.

    AutoModel.from_pretrained(OUT, trust_remote_code=True) needs nothing of this project; its `sample` is
    `penumbra sample`. checkpoint.export_every exports during training.
    """
    from pretrain.checkpoint.hf import ExportSettings

    from .exporting import run_export

    chosen = ExportSettings(dtype=dtype.value, weights=weights.value if weights else None)
    run_export(run, out, step, chosen)


@app.command("eval")
@with_sampling()
def evaluate(
    run: RunFolder,
    task: Annotated[
        str,
        typer.Option(
            help="bound (what training estimates); nelbo, nelbo_steps, nelbo_kept, delbo, nll_discrete; toy_functions, "
            "demo_tasks, humaneval, or a HumanEval-format .jsonl file."
        ),
    ] = "bound",
    json: JsonFile = None,
    num_samples: Annotated[int, typer.Option(help="Completions per code task.", min=1)] = 1,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first so many tasks or rows.", min=1, show_default="all")
    ] = None,
    num_draws: Annotated[int, typer.Option(help="Noise draws per row of the bound.", min=1)] = 4,
    num_latents: Annotated[
        int, typer.Option(help="Samples of z inside the logarithm of nelbo, nelbo_steps and delbo.", min=1)
    ] = 100,
    length: Length = None,
    batch_size: BatchSize = 32,
    seconds: Annotated[float, typer.Option(help="Time limit of one program.", min=0.1)] = 5.0,
    *,
    sampling: "SamplingSettings",
) -> None:
    """Measure a run: its likelihood bound on held-out data, or pass@1 on code tasks."""
    from eval.tasks import EvaluationSettings

    from .evaluating import run_evaluation

    settings = EvaluationSettings(
        sampling=sampling,
        num_samples=num_samples,
        length=length,
        limit=limit,
        num_draws=num_draws,
        num_latents=num_latents,
        batch_size=batch_size,
        seconds=seconds,
    )
    run_evaluation(run, task, settings, json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, for example runs/demo.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file.", show_default="RUN/report.html", metavar="FILE")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run."""
    from eval.report import write_report

    print(write_report(run, out))


class Benchmark(StrEnum):
    """What `penumbra bench` measures."""

    head = "head"
    step = "step"
    objectives = "objectives"
    checkpoint = "checkpoint"
    scaling = "scaling"
    gpu = "gpu"


@app.command()
def bench(
    what: Annotated[
        Benchmark,
        typer.Argument(
            help="head: loss and gradient of the head; step: a training step against transformers' Qwen2; "
            "objectives: hints, latents and blocks against plain masked diffusion, in training and sampling; "
            "checkpoint: how long a save keeps training waiting; "
            "scaling: two processes that train together against two that train alone; "
            "gpu: a model of 1.5 billion parameters on a GPU, by attention kernel, compilation and recomputation."
        ),
    ],
    json: JsonFile = None,
    repeats: Annotated[int, typer.Option(help="Timed repetitions; medians are reported.", min=1)] = 5,
) -> None:
    """Measure speed and memory as ratios to what one would use instead, in one run."""
    from tools.bench import run_benchmark

    run_benchmark(what.value, repeats=repeats, json_file=json)


@app.command()
def chaos(
    trials: Annotated[int, typer.Option(help="Runs that are disturbed, each in its own way.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of what happens, and when.")] = 0,
    kinds: Annotated[
        str,
        typer.Option(
            help="Faults that take turns: kill-one, kill-all, kill-in-save (kill: these three), sigterm, full-disk, "
            "bit-flip, truncation, nan; or all."
        ),
    ] = "kill",
    folder: Annotated[
        Path, typer.Option(help="For the runs; those of trials that went wrong stay.", metavar="DIR")
    ] = Path("runs/chaos"),
    only: Annotated[
        int | None,
        typer.Option(help="Repeat this trial alone, with the seed and kinds it had.", min=1, show_default="all"),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Train on two processes, kill them at random moments, and compare with an undisturbed run bit for bit.

    Exit codes: 0 all trials identical; 1 one is not, or it has lost more than the steps since its newest checkpoint.
    """
    from tools.chaos import run_chaos

    raise typer.Exit(run_chaos(trials=trials, seed=seed, kinds=kinds, folder=folder, only=only, json_file=json))


class ReproduceBudget(StrEnum):
    """How long a reproduction may train."""

    quick = "quick"
    full = "full"


@app.command()
def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A table or figure of the papers.", metavar="NAME", show_default="list them")
    ] = None,
    budget: Annotated[
        ReproduceBudget, typer.Option(help="quick: minutes on two cores; full: up to 20 minutes a model.")
    ] = ReproduceBudget.quick,
    seeds: Annotated[
        int, typer.Option(help="Runs of every model; with several: mean, standard deviation and paired tests.", min=1)
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for NAME.json, NAME.md and figures.", show_default="runs/reproduce/NAME-BUDGET"),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Train what a table of the papers needs, and print our numbers beside the paper's; run it again to go on."""
    from tools.reproduce import list_reproductions
    from tools.reproduce import reproduce as run_reproduction

    if name is None:
        print(list_reproductions())
    else:
        run_reproduction(name, budget.value, seeds=seeds, out=out, json_file=json)


def main() -> None:
    """The console script; SIGTERM ends it as an error would, with all that it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_or_refuse(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    main()
