"""Entry point of a run: `python -m pretrain.train RECIPE key=value ...`, alone or under torchrun."""

import os
import platform
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import RunConfig
from .endings import Ending
from .refusal import EXIT_REFUSED, run_or_refuse
from .settings import load_config

if TYPE_CHECKING:
    from .hooks.base import Hook
    from .hooks.spans import Spans
    from .parallel.mesh import Mesh


def resolve(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a recipe's name, of a config.yaml, or of a run folder that holds one, with overrides."""
    if recipe.endswith((".yaml", ".yml")):
        return load_config(Path(recipe), overrides)
    if (Path(recipe) / "config.yaml").is_file():
        return load_config(Path(recipe) / "config.yaml", overrides)
    from .recipes import build

    return build(recipe, overrides)


def train(config: RunConfig) -> Ending:
    """Runs or resumes a training run on the processes there are, and says how it ended."""
    from .data import open_data
    from .engines import make_engine
    from .hooks.signals import StopRequest, stop_signals
    from .hooks.spans import Spans
    from .parallel.mesh import process_mesh
    from .sole_run import sole_run
    from .throughput import peak_flops
    from .trainer import Trainer

    stop = StopRequest(60 * config.train.time_limit_minutes)
    with process_mesh(config.parallel) as mesh, _a_minute_after_an_error(mesh.world.size):
        data = open_data(config.data, mesh.world)
        with stop_signals(stop):
            model = config.model.with_vocabulary(data.tokenizer.vocab_size, data.tokenizer.mask_id)
            peak = peak_flops(mesh.device, config.train.precision)
            engine = make_engine(config, model, mesh)
            spans = Spans(mesh.device)
            trainer = Trainer(config, model, engine, data, hooks=[], peak_flops=peak, stop=stop, spans=spans)
            with sole_run(config.path, mesh.world):
                trainer.hooks = rank_hooks(config, mesh, spans)
                if mesh.world.rank == 0:
                    trainer.hooks += make_hooks(config, engine.num_parameters, mesh.world.size)
                ending = trainer.run()
            if ending is not Ending.FINISHED:
                _end_torchrun(os.environ)
                mesh.world.barrier()
            return ending


def rank_hooks(config: RunConfig, mesh: "Mesh", spans: "Spans") -> list["Hook"]:
    """The hooks of every rank."""
    from .hooks.exports import Exports
    from .hooks.profiling import MemorySnapshot
    from .hooks.spans import SpanFile
    from .hooks.watchdog import Watchdog

    rank, minutes, snapshot = mesh.world.rank, config.train.watchdog_minutes, config.log.memory_snapshot
    hooks: list[Hook] = [SpanFile(config.path / "spans" / f"rank-{rank}.jsonl", spans)]
    if minutes:
        hooks.append(Watchdog(config.path / "stalls", rank, 60 * minutes))
    if snapshot:
        hooks.append(MemorySnapshot(config.path / "profiles", rank, snapshot, mesh.device))
    if config.checkpoint.export_every:
        hooks.append(Exports(config, mesh.world))
    return hooks


def make_hooks(config: RunConfig, num_parameters: int, world_size: int) -> list["Hook"]:
    """The hooks of rank 0."""
    from .commit import commit
    from .hooks.collapse_warning import CollapseWarning
    from .hooks.config_file import ConfigFile
    from .hooks.metrics import MetricsFile
    from .hooks.profiling import Profiler
    from .hooks.progress import ProgressLine
    from .hooks.tensorboard import TensorBoardFiles
    from .hooks.wandb import WandbRun

    about = {"parameters": num_parameters, "world_size": world_size, "commit": commit(), **environment()}
    hooks: list[Hook] = [
        ConfigFile(config),
        MetricsFile(config.path / "metrics.jsonl", about),
        ProgressLine(config.name, config.train.steps),
    ]
    if config.model.latent is not None:
        hooks.append(CollapseWarning(config.train, warmup_steps=config.optim.warmup_steps))
    if config.log.wandb_project:
        hooks.append(WandbRun(config, {"parameters": num_parameters}))
    if config.log.tensorboard:
        hooks.append(TensorBoardFiles(config.path / "tensorboard"))
    if config.log.profile_steps:
        hooks.append(Profiler(config.path / "profiles", config.log.profile_steps))
    return hooks


@contextmanager
def _a_minute_after_an_error(world_size: int) -> Iterator[None]:
    """Where ranks depend on one another, an error leaves a minute for cleaning up, which may wait for a lost rank."""
    from .hooks.watchdog import end_within

    try:
        yield
    except BaseException:
        if world_size > 1:
            end_within(60.0)
        raise


def environment() -> dict[str, Any]:
    """Versions and machine, for records."""
    import numpy
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device,
        },
    }


def processor_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _end_torchrun(environ: Mapping[str, str]) -> None:
    """Asks this machine's torchrun to end, where it would start again what ends with another code than 0."""
    restarts = [int(environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if restarts[0] < restarts[1] and environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)


def main() -> None:
    """`python -m pretrain.train RECIPE key=value ...`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m pretrain.train RECIPE|config.yaml [key=value ...]   (see `penumbra recipes`)")
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    try:
        run_or_refuse(lambda: _leave(train(resolve(arguments[0], arguments[1:]))))
    except SystemExit as end:
        if end.code == EXIT_REFUSED:
            _end_torchrun(os.environ)
        raise


def _leave(ending: Ending) -> NoReturn:
    """Ends the process; one of several as it is.

    Where threads of its communication still run, taking down the interpreter has aborted now and then, and torchrun
    would start a run again that is at its end.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(ending)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending)


if __name__ == "__main__":
    main()
