"""Training steps of a model of 1.5 billion parameters on one GPU: attention kernels, compilation, recomputation."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from model.batch import Batch
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.flops import training_flops
from model.noise import NoiseKey
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import Mesh, build_mesh, single_process
from pretrain.recipes.coder import coder_1_5b
from pretrain.throughput import peak_flops

from .timing import in_turn

NUM_SEQUENCES, LENGTH, BLOCK_SIZE, DOCUMENT = 4, 4096, 32, 700
VOCABULARY = 151_666
"""Tokens of the tokenizer; the table has spare rows."""
MDLM = replace(coder_1_5b().model, mask_id=VOCABULARY)
BACKBONE = MDLM.backbone
assert isinstance(BACKBONE, TransformerConfig)
VMD = replace(
    MDLM,
    backbone=replace(BACKBONE, condition_dim=128),
    latent=LatentConfig(dim=128, recognition=RecognitionConfig(num_layers=BACKBONE.num_layers // 4)),
)
SETTINGS = {
    "backbone": f"Qwen2.5-1.5B's shape: {BACKBONE.num_layers} layers x {BACKBONE.dim}, tied head",
    "vocabulary": MDLM.vocab_size,
    "sequences": NUM_SEQUENCES,
    "length": LENGTH,
    "block_size": BLOCK_SIZE,
    "document": DOCUMENT,
    "precision": "bf16",
    "training": "a whole step with fused AdamW, gradients clipped; everything is recomputed unless the name says what",
    "mfu": "of the vendor's dense bf16 peak; what is recomputed does not count as work, what attention hides does",
    "ratio_to": "mdlm with SDPA, not compiled",
}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        model: what is trained.
        train: settings beside the precision.
        documents: rows hold several documents that do not see one another.
        sharded: by FSDP2, in a group of one process.
    """

    model: ModelConfig = MDLM
    train: Mapping[str, Any] = field(default_factory=dict)
    documents: bool = False
    sharded: bool = False


FULL = {"recompute": "full"}
COMPILED = {**FULL, "compile": True}
VARIANTS = {
    "sdpa": Variant(train=FULL),
    "flash": Variant(train={**FULL, "attention": "flash"}),
    "flex": Variant(train={**COMPILED, "attention": "flex"}),
    "compiled": Variant(train=COMPILED),
    "compiled_selective": Variant(train={**COMPILED, "recompute": "selective"}),
    "sharded": Variant(train=FULL, sharded=True),
    "sharded_compiled": Variant(train=COMPILED, sharded=True),
    "documents_sdpa": Variant(train={**COMPILED, "attention": "sdpa"}, documents=True),
    "documents_flash": Variant(train={**COMPILED, "attention": "flash"}, documents=True),
    "documents_flex": Variant(train={**COMPILED, "attention": "flex"}, documents=True),
    "cadd": Variant(replace(MDLM, augmentation=AugmentationConfig()), COMPILED),
    "vmd": Variant(VMD, COMPILED),
    "block_sdpa": Variant(replace(MDLM, block_size=BLOCK_SIZE), {**COMPILED, "attention": "sdpa"}),
    "block_flex": Variant(replace(MDLM, block_size=BLOCK_SIZE), {**COMPILED, "attention": "flex"}),
}


def measure(repeats: int) -> dict[str, float]:
    """Tokens per second, model FLOPs utilisation and peak memory (GiB) of every variant, one after the other.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("penumbra bench gpu needs an NVIDIA GPU, there is none here: use penumbra bench step")
    results: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        measured = _measured(variant, repeats)
        results |= {f"gpu.{name}.{key}": value for key, value in measured.items()}
        speed = measured["tokens_per_second"] / results["gpu.sdpa.tokens_per_second"]
        results[f"gpu.{name}.tokens_per_second_ratio"] = speed
        print(f"{name:<20} {measured['tokens_per_second']:>8,.0f} tokens/s", flush=True)
    return results


def as_table(results: Mapping[str, float]) -> str:
    """One line per variant."""
    lines = [f"{'':<20} {'tokens/s':>10} {'MFU':>6} {'GiB':>6} {'ratio':>6}"]
    for name in VARIANTS:
        cells = (results[f"gpu.{name}.{key}"] for key in ("tokens_per_second", "mfu", "gib", "tokens_per_second_ratio"))
        lines.append(f"{name:<20} {{:>10,.0f}} {{:>6.3f}} {{:>6.1f}} {{:>6.2f}}".format(*cells))
    return "\n".join(lines)


def _measured(variant: Variant, repeats: int) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    device = torch.device("cuda")
    with _mesh(device, sharded=variant.sharded) as mesh:
        train = TrainConfig(precision="bf16", **variant.train)
        engine = FsdpEngine(variant.model, OptimConfig(), train, ParallelConfig(), mesh, seed=0)
        step, flops = _step(engine, variant)
        step()  # compiles
        seconds = in_turn({"step": step}, repeats)["step"]
        del engine, step
        torch.compiler.reset()
        gc.collect()
        memory = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
    return {
        "tokens_per_second": NUM_SEQUENCES * LENGTH / seconds,
        "mfu": flops / seconds / (peak_flops(device, "bf16") or float("nan")),
        "gib": memory / 2**30,
    }


def _step(engine: FsdpEngine, variant: Variant) -> tuple[Callable[[], None], int]:
    """From a corrupted batch to new weights, and its operations."""
    batch = _batch(documents=variant.documents)
    model = engine.model.config
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), model)
    take = torch.ones((), device=engine.mesh.device)

    def step() -> None:
        engine.forward_backward(Micro(batch, corruption, StepSchedule()), scale=1 / corruption.divisor, last=True)
        engine.reduce_and_clip(1.0)
        engine.step(lr=1e-4, take=take)
        if take.is_cuda:
            torch.cuda.synchronize()

    return step, training_flops(model, num_sequences=NUM_SEQUENCES, length=LENGTH, num_rows=corruption.num_masked)


def _batch(*, documents: bool) -> Batch:
    shape = (NUM_SEQUENCES, LENGTH)
    positions_L = torch.arange(LENGTH)
    return Batch(
        tokens_BL=torch.randint(VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(0)),
        maskable_BL=torch.ones(shape, dtype=torch.bool),
        document_BL=(positions_L // DOCUMENT).int().expand(shape).contiguous() if documents else None,
        positions_BL=(positions_L % DOCUMENT if documents else positions_L).expand(shape),
        index_B=torch.arange(NUM_SEQUENCES),
    )


@contextmanager
def _mesh(device: torch.device, *, sharded: bool) -> Iterator[Mesh]:
    if not sharded:
        yield single_process(device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield build_mesh(device, (1, 1, 1, 1))
    finally:
        dist.destroy_process_group()
