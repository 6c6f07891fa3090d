"""Entry point of a run: `python -m pretrain.train RECIPE key=value ...`, alone or under torchrun."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import RunConfig, load_config
from .refusal import run_or_refuse


def resolve(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a recipe's name, of a config.yaml, or of a run folder that holds one, with overrides."""
    if recipe.endswith((".yaml", ".yml")):
        return load_config(Path(recipe), overrides)
    if (Path(recipe) / "config.yaml").is_file():
        return load_config(Path(recipe) / "config.yaml", overrides)
    from .recipes import build

    return build(recipe, overrides)


def train(config: RunConfig) -> None:
    """Runs or resumes a training run on the processes there are."""
    from .data import open_data
    from .engines import make_engine
    from .parallel.mesh import process_mesh
    from .throughput import peak_flops
    from .trainer import Trainer

    with process_mesh(config.parallel) as mesh:
        data = open_data(config.data, mesh.world)
        model = config.model.with_vocabulary(data.tokenizer.vocab_size, data.tokenizer.mask_id)
        peak = peak_flops(mesh.device, config.train.precision)
        engine = make_engine(config, model, mesh)
        trainer = Trainer(config, model, engine, data, hooks=[], peak_flops=peak)
        if mesh.world.rank == 0:
            _open_folder(config.path)
            trainer.hooks = make_hooks(config, engine.num_parameters, mesh.world.size)
        trainer.run()


def make_hooks(config: RunConfig, num_parameters: int, world_size: int) -> list[Any]:
    """The hooks of rank 0."""
    from .hooks.collapse_warning import CollapseWarning
    from .hooks.config_file import ConfigFile
    from .hooks.metrics import MetricsFile
    from .hooks.progress import ProgressLine
    from .hooks.wandb import WandbRun

    about = {"parameters": num_parameters, "world_size": world_size, **environment()}
    hooks: list[Any] = [
        ConfigFile(config),
        MetricsFile(config.path / "metrics.jsonl", about),
        ProgressLine(config.name, config.train.steps),
    ]
    if config.model.latent is not None:
        hooks.append(CollapseWarning(config.train))
    if config.log.wandb_project:
        hooks.append(WandbRun(config, {"parameters": num_parameters}))
    return hooks


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


def _open_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the run's folder {folder} can not be made ({error}): choose another with folder=..."
        ) from None


def main() -> None:
    """`python -m pretrain.train RECIPE key=value ...`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m pretrain.train RECIPE|config.yaml [key=value ...]   (see `penumbra recipes`)")
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    run_or_refuse(lambda: train(resolve(arguments[0], arguments[1:])))


if __name__ == "__main__":
    main()
