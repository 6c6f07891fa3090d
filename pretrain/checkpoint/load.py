"""Finding the newest good checkpoint, resuming an engine from it, and loading a model for evaluation."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, ValidationError

from data_pipeline.tokenizers import Tokenizer
from model.config import ModelConfig
from model.diffusion import MaskedDiffusion

from ..engines.base import Engine
from ..notice import notice
from ..parallel.mesh import Axis
from ..settings import flat
from ..state import TrainState
from .manifest import read_manifest, sealed_in
from .verify import ALONE, damage

CHECKPOINTS = "checkpoints"


def newest_good(
    folder: Path, world: Axis = ALONE, *, wanted: Callable[[Path], bool] = lambda path: True
) -> Path | None:
    """The newest checkpoint of a folder that is wanted, sealed and undamaged; all ranks check it together.

    Damaged ones are named on stderr and passed over.
    """
    for path in world.from_first(lambda: list(filter(wanted, reversed(sealed_in(folder))))):
        fault = damage(path, world)
        if fault is None:
            return path
        if world.rank == 0:
            notice(f"passing over checkpoint {path.name}: {fault}")
    return None


def resume_point(folder: Path, world: Axis = ALONE) -> Path | None:
    """The checkpoint that a run goes on from; None where it has not saved one yet.

    Raises:
        ValueError: it has some, and none of them can be used; a run that began anew would replace them.
    """
    found = newest_good(folder, world)
    if found is None and (unusable := world.from_first(lambda: [path.name for path in sealed_in(folder)])):
        raise ValueError(
            f"of the checkpoints in {folder} none can be used ({', '.join(unusable)}; the reasons stand above): mend "
            "them, move them away to begin anew, or set another folder=..."
        )
    return found


def resume(checkpoint: Path, engine: Engine, model: ModelConfig, identity: Mapping[str, object]) -> TrainState:
    """Loads a checkpoint into an engine, at any world size, and returns where the run stood.

    Args:
        identity: what noise and data order depend on; see TrainState.

    Raises:
        ValueError: the checkpoint holds another model, or comes from a run on other data or with another seed.
    """
    there, here = asdict(read_model_config(checkpoint)), asdict(model)
    _refuse_difference(checkpoint, "another model", flat(there, "model."), flat(here, "model."))
    state = read_state(checkpoint)
    _refuse_difference(checkpoint, "another run", state.identity, identity)
    tensors = engine.state_dict()
    saved = dcp.FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    if "ema" in tensors and not any(key.startswith("ema.") for key in saved):
        raise ValueError(f"{checkpoint} has no averaged weights: set train.ema_decay=0 or start in another folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=checkpoint / "tensors", no_dist=engine.mesh.world.size == 1)
    engine.load_state_dict(tensors, num_updates=state.step - state.skipped)
    return state


def initialise_from(run: Path, engine: Engine, tokenizer: Tokenizer) -> str:
    """Takes over the weights that a run (its averaged ones, where kept) and an engine have in common, by name.

    Returns one line about what was taken. A damaged or foreign run is refused.

    Raises:
        ValueError: nothing usable there, another tokenizer, no name in common, or other shapes.
    """
    checkpoint = locate(run, engine.mesh.world)
    if read_state(checkpoint).identity["data.tokenizer"] != tokenizer.sha256():
        raise ValueError(f"init_from={run} was trained with another tokenizer: tokenise the data with that one")
    saved = dcp.FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    group = best_group(saved)
    there = {key.removeprefix(f"{group}."): meta for key, meta in saved.items() if key.startswith(f"{group}.")}
    tensors = engine.state_dict()
    common = {name: tensor for name, tensor in tensors["model"].items() if name in there}
    if not common:
        raise ValueError(f"init_from={run} has no parameter in common with this model: use a run of the same backbone")
    for name, tensor in common.items():
        if tuple(there[name].size) != tuple(tensor.shape):  # type: ignore[union-attr]
            raise ValueError(
                f"init_from={run}: {name} is {tuple(there[name].size)} there and {tuple(tensor.shape)} here: "  # type: ignore[union-attr]
                "use the same backbone settings"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({group: common}, checkpoint_id=checkpoint / "tensors", no_dist=engine.mesh.world.size == 1)
    for name, average in tensors.get("ema", {}).items():
        average.copy_(tensors["model"][name])
    engine.load_state_dict(tensors, num_updates=0)
    new, unused = len(tensors["model"]) - len(common), len(there) - len(common)
    return f"init_from {checkpoint}: {len(common)} parameters taken over, {new} new here, {unused} not used"


def best_group(saved: Mapping[str, object]) -> str:
    """Where a checkpoint has its averaged weights, or its weights if it has none."""
    return "ema" if any(key.startswith("ema.") for key in saved) else "model"


@dataclass(frozen=True)
class Loaded:
    """A model ready for evaluation, with all that came with it."""

    model: MaskedDiffusion
    tokenizer: Tokenizer | None
    state: TrainState
    checkpoint: Path

    @property
    def run(self) -> Path:
        """The folder of the run that wrote the checkpoint."""
        return Path(os.path.normpath(self.checkpoint / ".." / ".."))

    @property
    def length(self) -> int:
        """Positions per row in training."""
        return int(self.state.identity["data.length"])


def load_for_evaluation(run: Path, *, averaged: bool = True, device: torch.device | None = None) -> Loaded:
    """The model of a run folder (its newest good checkpoint) or of one checkpoint folder, in float32.

    Args:
        averaged: use the averaged weights where the run keeps them.
        device: where to compute; default: the GPU where there is one, else the CPU.

    Raises:
        ValueError: nothing usable there.
    """
    checkpoint = locate(run)
    config = read_model_config(checkpoint)
    with torch.device("meta"):
        model = MaskedDiffusion(config)
    model.to_empty(device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    saved = dcp.FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    group = best_group(saved) if averaged else "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = {name: p.detach() for name, p in model.named_parameters()}
        dcp.load({group: weights}, checkpoint_id=checkpoint / "tensors", no_dist=True)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer") if (checkpoint / "tokenizer").exists() else None
    return Loaded(model.eval(), tokenizer, read_state(checkpoint), checkpoint)


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model configuration that travels in a checkpoint."""
    try:
        return TypeAdapter(ModelConfig).validate_json((checkpoint / "model.json").read_text())
    except (OSError, ValidationError) as error:
        raise ValueError(
            f"{checkpoint}/model.json does not describe a model of this version ({_one_line(error)})"
        ) from None


def locate(run: Path, world: Axis = ALONE) -> Path:
    """The newest good checkpoint of a run folder, or a checkpoint folder itself, verified.

    Raises:
        ValueError: nothing usable there.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a run folder (it does not exist): pass one such as runs/demo")
    if (run / "manifest.json").is_file() and (run / "tensors").is_dir():
        fault = damage(run, world)
        if fault:
            raise ValueError(f"checkpoint {run} is damaged ({fault}): use another one of the run")
        read_manifest(run)
        return run
    found = newest_good(run / CHECKPOINTS, world)
    if found is None:
        raise ValueError(f"{run} is not a run folder with a usable checkpoint: train it first with `penumbra train`")
    return found


def read_state(checkpoint: Path) -> TrainState:
    """Where the run stood."""
    try:
        return TypeAdapter(TrainState).validate_json((checkpoint / "state.json").read_text())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{checkpoint}/state.json is not of this version ({_one_line(error)})") from None


def _refuse_difference(checkpoint: Path, whose: str, there: Mapping[str, object], here: Mapping[str, object]) -> None:
    differing = [key for key in dict.fromkeys((*here, *there)) if there.get(key) != here.get(key)]
    if differing:
        listed = "; ".join(f"{key} is {there.get(key)} there and {here.get(key)} here" for key in differing)
        raise ValueError(
            f"{checkpoint} is a checkpoint of {whose} ({listed}): restore these settings, or train in another folder "
            "with folder=..."
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
