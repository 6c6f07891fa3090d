"""Exported folders against the runs they come from, read by transformers, safetensors and nothing of this project."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data_pipeline.tokenizers import Tokenizer, make_tokenizer, value_tokenizer
from eval.completion import complete
from eval.sampling.settings import SamplingSettings
from model.config import ModelConfig, TransformerConfig
from model.diffusion import MaskedDiffusion
from pretrain.checkpoint import bundle, hf, weights
from pretrain.checkpoint.hf import ExportSettings, export
from pretrain.checkpoint.load import CHECKPOINTS, load_for_evaluation
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process
from pretrain.recipes import build, recipes
from pretrain.state import TrainState
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
USE = Path(__file__).with_name("use_exports.py")
MODEL = ModelConfig(backbone=TransformerConfig(dim=16, num_layers=1, num_heads=2), vocab_size=33, mask_id=32)
MakeConfig = Callable[..., RunConfig]
SYSTEMS = {
    "mdlm": (),
    "block_vmd": ("model.block_size=8", "model.latent.dim=4", "model.latent.inject=embedding"),
    "vadd": ("model.latent.dim=4", "model.backbone.condition_dim=8", "model.time_conditioning=true"),
    "cadd": ("model.augmentation.fusion=concat",),
}
TEXTS = ["", "def f(x):\n    return x  *  3\n", "na\u00efve \u2014 <|mask|> and <|endoftext|> \U0001f600", "\t\r\n  "]
LENGTH, PROMPT, SEED = 27, "def f", 11
SMALL_FILES = 20_000


def train_small(folder: Path, make_config: MakeConfig, *overrides: str) -> Path:
    train(make_config(folder, "train.steps=4", "checkpoint.every=2", "validation.every=4", *overrides))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> dict[str, Path]:
    """A run of every system, of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train_small(folder / name, make_config, *overrides) for name, overrides in SYSTEMS.items()}


def newest(run: Path) -> Path:
    return sorted((run / CHECKPOINTS).iterdir())[-1]


def checkpoint_with(folder: Path, save_tokenizer: Callable[[Path], None] | None) -> Path:
    """A checkpoint of a tiny model that was never trained."""
    engine = FsdpEngine(MODEL, OptimConfig(), TrainConfig(), ParallelConfig(), single_process(), seed=0)
    state = TrainState(step=1, identity={"data.length": 8})
    return save_checkpoint(
        folder, engine.state_dict(), state, MODEL, engine.mesh.world, save_tokenizer=save_tokenizer, keep=9
    )


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export, as safetensors reads them, where the index says they are."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, "pt") as file:
            here = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert here.keys() == {key for key, place in index["weight_map"].items() if place == name}
        found |= here
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in found.values())
    return found


def saved(checkpoint: Path, tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """The groups of a checkpoint, as PyTorch's own converter reads them."""
    dcp_to_torch_save(checkpoint / "tensors", tmp_path / "all.pt")
    groups: dict[str, dict[str, Tensor]] = torch.load(tmp_path / "all.pt")
    return groups


def use(jobs: dict[str, dict[str, Any]], place: Path) -> dict[str, dict[str, Any]]:
    """What the program without this project makes of exported folders."""
    torch.save(jobs, place / "jobs.pt")
    environment = {
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # how a matrix product is split sets its last bits
        "PATH": os.environ["PATH"],
    }
    command = [sys.executable, "-I", str(USE), str(place / "jobs.pt"), str(place / "results.pt")]
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    results: dict[str, dict[str, Any]] = torch.load(place / "results.pt", weights_only=False)
    return results


def inputs(model: MaskedDiffusion) -> dict[str, Any]:
    """Half-hidden tokens, with all that the switches of a model ask for."""
    generator = torch.Generator().manual_seed(2)
    config, length = model.config, 24
    ids_BL = torch.randint(250, (3, length), generator=generator)
    ids_BL[:, ::2] = config.mask_id
    given: dict[str, Any] = {"input_ids": ids_BL}
    segments = config.num_segments(length)
    dtype = next(model.parameters()).dtype
    if config.augmentation is not None or config.time_conditioning:
        given["t"] = torch.rand(3, segments, generator=generator, dtype=torch.float64)
    if config.latent is not None:
        given["latent"] = torch.randn(3, segments, config.latent.dim, generator=generator).to(dtype)
    if config.augmentation is not None:
        given["hint"] = torch.randn(3, length, config.backbone.dim, generator=generator).to(dtype)
    return given


@torch.inference_mode()
def logits(model: MaskedDiffusion, input_ids: Tensor, **given: Any) -> Tensor:
    hidden_BLD = model.denoise(input_ids, **given)
    rows_M = torch.arange(input_ids.numel())
    return model.logits(hidden_BLD.flatten(0, 1), rows_M).view(*input_ids.shape, -1)


def sampled(model: MaskedDiffusion, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """What `penumbra sample` writes: token ids up to the end, and the text."""
    heard: list[list[int]] = []

    class Listening(Tokenizer):
        def __init__(self) -> None:
            self.__dict__ = tokenizer.__dict__

        def decode(self, ids: Any, *, keep_special: bool = False) -> str:
            heard.append(list(ids))
            return super().decode(ids, keep_special=keep_special)

    settings = SamplingSettings(temperature=1.0, seed=SEED, steps=9)
    completions = complete(model, Listening(), [PROMPT] * 3, settings, length=LENGTH, batch_size=2)
    return heard[0::2], [completion.text for completion in completions]


@pytest.mark.slow
def test_a_stranger_gets_the_same_logits_samples_and_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    """Of every system, in float32 from the averaged weights, and in bfloat16 from those as trained."""
    jobs, expected = {}, {}
    for name, run in runs.items():
        for dtype, group in (("fp32", "ema"), ("bf16", "raw")):
            job = f"{name}_{dtype}"
            settings = ExportSettings(dtype=dtype, weights=group, max_file_bytes=SMALL_FILES)  # type: ignore[arg-type]
            folder = export(newest(run), tmp_path / job, settings)
            loaded = load_for_evaluation(run, averaged=group == "ema")
            assert loaded.tokenizer is not None
            model = loaded.model.to(hf.DTYPES[settings.dtype])
            given, prompt = inputs(model), torch.tensor([loaded.tokenizer.encode(PROMPT)] * 3)
            sample = {"input_ids": prompt, "length": LENGTH, "seed": SEED, "steps": 9}
            jobs[job] = {"folder": str(folder), "forward": given, "sample": sample, "texts": TEXTS}
            expected[job] = (loaded, logits(model, **given), sampled(model, loaded.tokenizer))
    for job, found in use(jobs, tmp_path).items():
        loaded, theirs, (ids, texts) = expected[job]
        assert found["dtype"] == ("torch.float32" if job.endswith("fp32") else "torch.bfloat16")
        assert torch.equal(found["logits"], theirs), job
        assert torch.isfinite(found["logits"]).sum() == theirs.numel() - theirs.shape[0] * theirs.shape[1]
        end, start = loaded.tokenizer.end_id, jobs[job]["sample"]["input_ids"].shape[1]
        rows = found["tokens"][:, start:].tolist()
        assert found["tokens"].shape == (3, 32 if "block" in job else LENGTH)
        assert [row[: len(own)] for row, own in zip(rows, ids, strict=True)] == ids, job
        assert all(set(row[len(own) :]) <= {end} for row, own in zip(rows, ids, strict=True))
        assert len({tuple(row) for row in rows}) == 3
        assert found["completions"] == texts
        assert found["ids"] == [loaded.tokenizer.encode(text) for text in TEXTS]
        assert found["config"]["model"] == asdict(loaded.model.config)
        assert found["config"]["length"] == 32


@pytest.mark.slow
def test_every_tokenizer_reads_as_it_did_in_training(tmp_path: Path) -> None:
    """Those we make, and a foreign one that frames texts and cuts them, which training does not let it do."""
    foreign = tokenizers.Tokenizer.from_str(make_tokenizer("bytes", lambda: iter(()))._json)
    foreign.add_special_tokens(["<s>"])
    frame = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", foreign.token_to_id("<s>"))])
    foreign.post_processor = frame
    foreign.enable_truncation(3)
    foreign.save(str(tmp_path / "foreign.json"))
    made = {
        "bpe": make_tokenizer("bpe:300", lambda: iter([*TEXTS, "def def def return return"] * 9)),
        "characters": make_tokenizer("characters", lambda: iter(TEXTS)),
        "foreign": Tokenizer.load(tmp_path / "foreign.json"),
        "values": value_tokenizer(9),
    }
    jobs = {}
    for name, tokenizer in made.items():
        folder = export(checkpoint_with(tmp_path / name, tokenizer.save), tmp_path / f"{name}_out", ExportSettings())
        jobs[name] = {"folder": str(folder), "texts": ["0 8 3 3"] if name == "values" else TEXTS}
    for name, found in use(jobs, tmp_path).items():
        tokenizer, texts = made[name], jobs[name]["texts"]
        assert found["ids"] == [tokenizer.encode(text) for text in texts], name
        assert found["decoded"] == [tokenizer.decode(ids) for ids in found["ids"]] == list(texts), name
        assert found["special"] == (tokenizer.mask_id, tokenizer.pad_id, tokenizer.end_id)


@pytest.mark.parametrize("group", ["ema", "raw"])
def test_safetensors_reads_what_the_checkpoint_holds(runs: dict[str, Path], tmp_path: Path, group: str) -> None:
    """Whatever the size of the files, and rounded to bfloat16 as PyTorch rounds."""
    checkpoint = newest(runs["vadd"])
    groups = saved(checkpoint, tmp_path)
    theirs = {f"model.{name}": tensor for name, tensor in groups["ema" if group == "ema" else "model"].items()}
    assert not torch.equal(*(groups[name]["denoiser.embed.weight"] for name in ("ema", "model")))
    counts = []
    for number, limit in enumerate((1, SMALL_FILES, 10**9)):
        for dtype in ("fp32", "bf16"):
            out = tmp_path / f"out{number}{dtype}"
            settings = ExportSettings(dtype=dtype, weights=group, max_file_bytes=limit)  # type: ignore[arg-type]
            ours = stored(export(checkpoint, out, settings))
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert tensor.dtype == hf.DTYPES[settings.dtype]
                assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name
        files = sorted(path.name for path in out.glob("*.safetensors"))
        counts.append(len(files))
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        several = [path for path in out.glob("*.safetensors") if len(safe_open(path, "pt").keys()) > 1]
        assert all(path.stat().st_size < limit + 4000 for path in several)
    assert counts[0] == len(theirs) > counts[1] > counts[2] == 1


def test_averaged_weights_are_the_default_where_there_are_any(
    runs: dict[str, Path], tmp_path: Path, make_config: MakeConfig
) -> None:
    ours, averaged = (
        stored(export(newest(runs["mdlm"]), tmp_path / str(chosen), ExportSettings(weights=chosen)))  # type: ignore[arg-type]
        for chosen in (None, "ema")
    )
    assert all(torch.equal(ours[name], averaged[name]) for name in averaged)
    plain = newest(train_small(tmp_path / "plain", make_config, "train.ema_decay=0"))
    ours = stored(export(plain, tmp_path / "plain_out", ExportSettings()))
    theirs = saved(plain, tmp_path)["model"]
    assert all(torch.equal(ours[f"model.{name}"], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="has no averaged weights"):
        export(plain, tmp_path / "none", ExportSettings(weights="ema"))
    assert not list(tmp_path.glob("none*"))


def test_no_more_than_one_tensor_is_held(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one is read, those before it are gone; and the metadata are read once for all of them."""
    read, metadata = weights._Reader.tensor, weights.dcp.FileSystemReader.read_metadata
    seen: list[weakref.ref[Tensor]] = []
    opened: list[int] = []

    def watched(self: Any, *arguments: Any) -> Tensor:
        assert [ref for ref in seen if ref() is not None] == []
        tensor = read(self, *arguments)
        seen.append(weakref.ref(tensor))
        return tensor

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        opened.append(1)
        return metadata(self, *arguments, **keywords)

    monkeypatch.setattr(weights._Reader, "tensor", watched)
    monkeypatch.setattr(weights.dcp.FileSystemReader, "read_metadata", counted)
    out = export(newest(runs["mdlm"]), tmp_path / "out", ExportSettings())
    assert len(seen) == len(stored(out)) > 10
    assert len(opened) == 2


def test_the_code_is_the_projects_own_and_complete(runs: dict[str, Path], tmp_path: Path) -> None:
    """transformers finds every file by relative imports, and needs nothing but packages that are there."""
    from transformers.dynamic_module_utils import check_imports, get_relative_import_files

    out = export(newest(runs["mdlm"]), tmp_path / "out", ExportSettings())
    sources = [path for room in bundle.ROOMS for path in room.glob("*.py") if path.stem != "__init__"]
    assert {path.name for path in out.glob("*.py")} == {path.name for path in sources}
    assert len({path.name for path in sources}) == len(sources)
    for path in sources:
        copied = (out / path.name).read_text()
        assert copied.replace("from .", "from model.") == path.read_text().replace("from .", "from model.")
        imported = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", copied, re.MULTILINE)
        assert not {name.partition(".")[0] for name in imported} & {"model", "eval", "pretrain", "data_pipeline"}
        relative = check_imports(out / path.name)
        assert set(relative) == {name[1:] for name in imported if name.startswith(".")}
        assert all((out / f"{name}.py").is_file() for name in relative)
    needed = {Path(path).name for path in get_relative_import_files(out / "modeling_penumbra.py")}
    assert {"diffusion.py", "loop.py", "settings.py", "config.py"} <= needed


def test_every_recipes_model_travels_in_config_json() -> None:
    from eval.sampling.modeling_penumbra import settings_of

    for name in recipes():
        model = build(name).model
        assert settings_of(ModelConfig, json.loads(json.dumps(asdict(model)))) == model


def test_the_card_says_what_the_run_was(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["block_vmd"]
    card = (export(newest(run), tmp_path / "out", ExportSettings()) / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert f"{validation['bound']} {validation[validation['bound']]:.4f} +- " in card
    started = next(line for line in lines if line.get("event") == "start")
    assert f"| commit | {started['commit']} |" in card
    assert (run / "config.yaml").read_text().rstrip() in card
    assert "# block_vmd, step 4\n" in card
    assert "blocks of 8, a latent of 4 per block" in card
    assert "averaged (EMA), float32" in card
    earlier = (run / CHECKPOINTS / "step-00000002").rename(tmp_path / "copied")
    card = (export(earlier, tmp_path / "copied_out", ExportSettings()) / "README.md").read_text()
    earlier.rename(run / CHECKPOINTS / "step-00000002")
    assert "| bound |" not in card
    assert "## Recipe" not in card
    compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "README", "exec")


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, out = newest(runs["mdlm"]), tmp_path / "out"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pretrain.checkpoint.hf import ExportSettings, export\n"
        "count = []\n"
        "def hang():\n    count.append(1)\n"
        "    if len(count) == 5:\n        print('half', flush=True)\n        time.sleep(600)\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]), ExportSettings(max_file_bytes=9000), before_each=hang)\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["out.exporting"]
    assert list((tmp_path / "out.exporting").glob("*.safetensors"))
    export(checkpoint, out, ExportSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_takes_the_place_of_an_earlier_one(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(newest(runs["vadd"]), tmp_path / "out", ExportSettings(max_file_bytes=SMALL_FILES))
    (out / "old").touch()
    export(newest(runs["mdlm"]), out, ExportSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "old").exists()
    assert json.loads((out / "config.json").read_text())["model"]["latent"] is None
    stored(out)


@pytest.mark.parametrize("nth", [1, 3, 20])
def test_a_full_disk_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    sync, asked = os.fsync, []

    def full(descriptor: int) -> None:
        asked.append(1)
        if len(asked) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export(newest(runs["mdlm"]), tmp_path / "out", ExportSettings(max_file_bytes=SMALL_FILES))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_without_tokenizer_is_exported_without_one(tmp_path: Path) -> None:
    out = export(checkpoint_with(tmp_path / "run", None), tmp_path / "out", ExportSettings())
    assert not list(out.glob("tokenizer*"))
    assert "no tokenizer" in (out / "README.md").read_text()
    sample = {"input_ids": torch.empty(2, 0, dtype=torch.int64), "temperature": 0.0, "order": "left_to_right"}
    job = {"folder": str(out), "forward": {"input_ids": torch.full((1, 4), 32)}, "sample": sample}
    found = use({"job": job}, tmp_path)["job"]
    assert found["tokens"].shape == (2, 8)
    assert 0 <= found["tokens"].min() <= found["tokens"].max() < 32
    assert found["config"]["eos_token_id"] is None
