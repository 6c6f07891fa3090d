"""What hints, latents and blocks cost beside plain masked diffusion, in training and in sampling (CADD Table 4)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.sampling.hints import HintPolicy
from eval.sampling.loop import Policies, sample
from eval.sampling.state import SamplerState
from model.batch import Batch
from model.config import AugmentationConfig, LatentConfig, ModelConfig, RecognitionConfig, TransformerConfig
from model.corruption import Corruption, corrupt
from model.diffusion import MaskedDiffusion, StepSchedule
from model.flops import training_flops
from model.noise import NoiseKey
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process

from .memory import peak_extra_bytes
from .timing import beside_the_first


@dataclass(frozen=True)
class Shape:
    """What all systems share; the mask is the last token of the vocabulary."""

    backbone: TransformerConfig = TransformerConfig(dim=256, num_layers=12, num_heads=4)
    vocab_size: int = 50_258
    num_sequences: int = 16
    num_samples: int = 4
    length: int = 256
    block_size: int = 16

    @property
    def tokens_BL(self) -> Tensor:
        """Random tokens, the mask not among them."""
        shape = (self.num_sequences, self.length)
        return torch.randint(self.vocab_size - 1, shape, generator=torch.Generator().manual_seed(0))


SHAPE = Shape()
SAMPLING_STEPS = 2
SETTINGS = {
    "backbone": f"DiT, {SHAPE.backbone.num_layers} layers x {SHAPE.backbone.dim}",
    "vocabulary": SHAPE.vocab_size,
    "sequences": SHAPE.num_sequences,
    "samples": SHAPE.num_samples,
    "length": SHAPE.length,
    "block_size": SHAPE.block_size,
    "precision": "fp32",
    "training": "a whole step with fused AdamW; the recognition network is as deep as the denoiser, vmd's half as deep",
    "mib": "peak of a training step above weights and optimizer state, or of a sampling loop above weights",
    "sampling": f"{SAMPLING_STEPS} network calls on half-masked rows, categorical draws in fp64, latents drawn anew",
    "ratio_to": "the same DiT as MDLM, just before and after; of_flop_ratio is tokens_per_second_ratio x flop_ratio",
}
TARGETS = {
    "objectives.cadd.tokens_per_second_ratio": 0.95,
    "objectives.vadd.of_flop_ratio": 0.90,
    "objectives.vmd.of_flop_ratio": 0.90,
    "objectives.block.of_flop_ratio": 0.90,
    "objectives.sampling.latent.tokens_per_second_ratio": 0.95,
    "objectives.sampling.k1.tokens_per_second_ratio": 0.95,
    "objectives.sampling.k2.of_k1_ratio": 1.0,
    "objectives.sampling.k3.of_k1_ratio": 1.0,
    "objectives.sampling.k4.of_k1_ratio": 1.0,
}
COLUMNS = {
    "tokens_per_second": "tokens/s",
    "gflop": "GFLOP",
    "mib": "MiB",
    "tokens_per_second_ratio": "speed",
    "flop_ratio": "FLOPs",
    "of_flop_ratio": "speed x FLOPs",
    "memory_ratio": "memory",
    "of_k1_ratio": "K x speed",
}


def measure(repeats: int, shape: Shape = SHAPE) -> dict[str, float]:
    """Training and sampling of every system, and their ratios to MDLM's; of_k1_ratio is K times the speed of K = 1."""
    training, sampling = _training(repeats, shape), _sampling(repeats, shape)
    return {
        **{f"objectives.{key}": value for key, value in training.items()},
        **{f"objectives.sampling.{key}": value for key, value in sampling.items()},
    }


def as_table(results: Mapping[str, float]) -> str:
    """One line per system, then one per target."""
    rows = list(dict.fromkeys(key.rpartition(".")[0] for key in results))
    names, widths = max(map(len, rows)), [max(9, len(title)) + 2 for title in COLUMNS.values()]
    lines = [" " * names + "".join(f"{t:>{w}}" for t, w in zip(COLUMNS.values(), widths, strict=True))]
    for row in rows:
        values = (results.get(f"{row}.{column}") for column in COLUMNS)
        cells = ("" if value is None else f"{value:,.4g}" for value in values)
        lines.append(f"{row:<{names}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    for key, least in TARGETS.items():
        verdict = "met" if results[key] >= least else "missed"
        lines.append(f"{key} = {results[key]:.3f}, target at least {least:.2f}: {verdict}")
    return "\n".join(lines)


def systems(shape: Shape) -> dict[str, ModelConfig]:
    """The models, MDLM first."""
    mdlm = ModelConfig(backbone=shape.backbone, vocab_size=shape.vocab_size, mask_id=shape.vocab_size - 1)
    vadd = replace(mdlm, backbone=replace(shape.backbone, condition_dim=128), latent=LatentConfig(dim=128))
    half = RecognitionConfig(num_layers=shape.backbone.num_layers // 2)
    vmd = replace(vadd, latent=LatentConfig(dim=128, recognition=half))
    return {
        "mdlm": mdlm,
        "cadd": replace(mdlm, augmentation=AugmentationConfig()),
        "vadd": vadd,
        "vmd": vmd,
        "block": replace(mdlm, block_size=shape.block_size),
        "block_vmd": replace(vmd, block_size=shape.block_size),
    }


def _training(repeats: int, shape: Shape) -> dict[str, float]:
    configs = systems(shape)
    steps = {name: partial(_training_step, _engine(config), config, shape) for name, config in configs.items()}
    results = _against_the_first(steps, shape.num_sequences * shape.length, repeats)
    flops = {name: _flops(config, shape) for name, config in configs.items()}
    memory = {name: peak_extra_bytes(step) for name, step in steps.items()}
    for name in steps:
        results |= {f"{name}.gflop": flops[name] / 1e9, f"{name}.mib": memory[name] / 2**20}
    for name in list(steps)[1:]:
        flop_ratio = flops[name] / flops["mdlm"]
        results[f"{name}.flop_ratio"] = flop_ratio
        results[f"{name}.of_flop_ratio"] = results[f"{name}.tokens_per_second_ratio"] * flop_ratio
        results[f"{name}.memory_ratio"] = memory[name] / memory["mdlm"]
    return results


def _engine(config: ModelConfig) -> FsdpEngine:
    return FsdpEngine(config, OptimConfig(), TrainConfig(), ParallelConfig(), single_process(), seed=0)


def _training_step(engine: FsdpEngine, config: ModelConfig, shape: Shape) -> None:
    """From clean tokens to new weights."""
    batch, corruption = _corrupted(config, shape)
    engine.forward_backward(Micro(batch, corruption, StepSchedule()), scale=1 / corruption.divisor, last=True)
    engine.reduce_and_clip(1.0)
    engine.step(lr=1e-4, take=torch.ones(()))


def _flops(config: ModelConfig, shape: Shape) -> int:
    num_rows = _corrupted(config, shape)[1].num_masked
    return training_flops(config, num_sequences=shape.num_sequences, length=shape.length, num_rows=num_rows)


def _corrupted(config: ModelConfig, shape: Shape) -> tuple[Batch, Corruption]:
    tokens_BL = shape.tokens_BL
    batch = Batch(
        tokens_BL=tokens_BL,
        maskable_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        positions_BL=torch.arange(shape.length).expand_as(tokens_BL),
        index_B=torch.arange(shape.num_sequences),
    )
    return batch, corrupt(batch, NoiseKey(0, 0, batch.index_B), config)


def _sampling(repeats: int, shape: Shape) -> dict[str, float]:
    configs = systems(shape)
    samplers = {
        "mdlm": _sampler(configs["mdlm"], shape, Policies()),
        "latent": _sampler(configs["vadd"], shape, Policies(latent="redrawn")),
        **{f"k{k}": _sampler(configs["cadd"], shape, Policies(hints=HintPolicy(num_hints=k))) for k in range(1, 5)},
    }
    results = _against_the_first(samplers, shape.num_samples * shape.length * SAMPLING_STEPS, repeats)
    flops = {name: _counted_flops(sampler) for name, sampler in samplers.items()}
    memory = {name: peak_extra_bytes(sampler) for name, sampler in samplers.items()}
    for name in samplers:
        results |= {f"{name}.gflop": flops[name] / 1e9, f"{name}.mib": memory[name] / 2**20}
    for name in list(samplers)[1:]:
        results[f"{name}.flop_ratio"] = flops[name] / flops["mdlm"]
        results[f"{name}.memory_ratio"] = memory[name] / memory["mdlm"]
    speed = {k: results[f"k{k}.tokens_per_second_ratio"] for k in range(1, 5)}
    return results | {f"k{k}.of_k1_ratio": k * speed[k] / speed[1] for k in range(2, 5)}


def _sampler(config: ModelConfig, shape: Shape, policies: Policies) -> Callable[[], SamplerState]:
    """The sampling loop on rows of which half is hidden."""
    tokens_BL = shape.tokens_BL[: shape.num_samples]
    state = SamplerState.start(tokens_BL, tokens_BL % 2 == 0, mask_id=config.mask_id, seed=0)
    return partial(sample, MaskedDiffusion(config).eval(), state, policies, SAMPLING_STEPS)


def _counted_flops(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products and of attention in a call; the counter does not know the CPU's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def _against_the_first(sides: Mapping[str, Callable[[], object]], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each side, and its ratio to the first's, which runs before and after every other."""
    seconds, speed = beside_the_first(sides, repeats)
    ratios = {f"{name}.tokens_per_second_ratio": ratio for name, ratio in speed.items()}
    return {f"{name}.tokens_per_second": tokens / seconds[name] for name in sides} | ratios
