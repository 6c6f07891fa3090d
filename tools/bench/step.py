"""A training step of ours against transformers' Qwen2ForCausalLM made bidirectional, same shapes, same process."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import Batch
from model.config import ModelConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.noise import NoiseKey
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process

from .timing import alternate

NUM_SEQUENCES, LENGTH = 4, 512
BACKBONE = TransformerConfig(
    dim=256,
    num_layers=12,
    num_heads=8,
    num_kv_heads=2,
    ffn_dim=1024,
    norm="rmsnorm",
    ffn="swiglu",
    qkv_bias=True,
    tie_embeddings=True,
    rope_theta=1_000_000.0,
)
MODEL = ModelConfig(backbone=BACKBONE, vocab_size=151_936, mask_id=151_666)
SETTINGS = {
    "sequences": NUM_SEQUENCES,
    "length": LENGTH,
    "precision": "fp32",
    "optimizer": "fused AdamW, gradient norm clipped at 1",
    "ratio_to": "transformers Qwen2ForCausalLM, SDPA, bidirectional mask, cross-entropy on full logits, masked",
}


def measure(repeats: int) -> dict[str, float]:
    """Tokens per second of both, their ratio, and the number of parameters."""
    batch = _batch()
    ours, num_parameters = _our_step(batch)
    theirs, their_parameters = _their_step(batch)
    if num_parameters != their_parameters:
        raise AssertionError(f"{num_parameters} parameters here, {their_parameters} there")
    seconds, their_seconds = alternate(ours, theirs, repeats)
    tokens = NUM_SEQUENCES * LENGTH
    return {
        "step.tokens_per_second_ratio": their_seconds / seconds,
        "step.tokens_per_second": tokens / seconds,
        "step.transformers_tokens_per_second": tokens / their_seconds,
        "step.parameters": num_parameters,
    }


def _batch() -> Batch:
    shape = (NUM_SEQUENCES, LENGTH)
    return Batch(
        tokens_BL=torch.randint(150_000, shape, generator=torch.Generator().manual_seed(0)),
        maskable_BL=torch.ones(shape, dtype=torch.bool),
        document_BL=torch.zeros(shape, dtype=torch.int32),
        positions_BL=torch.arange(LENGTH).expand(shape),
        index_B=torch.arange(NUM_SEQUENCES),
    )


def _our_step(batch: Batch) -> tuple[Callable[[], None], int]:
    engine = FsdpEngine(MODEL, OptimConfig(), TrainConfig(), ParallelConfig(), single_process(), seed=0)

    def step() -> None:
        corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), MODEL)
        engine.forward_backward(Micro(batch, corruption, StepSchedule()), scale=1 / corruption.divisor, last=True)
        engine.reduce_and_clip(1.0)
        engine.step(lr=1e-4, take=torch.ones(()))

    return step, sum(p.numel() for p in engine.model.parameters())


def _their_step(batch: Batch) -> tuple[Callable[[], None], int]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    b = BACKBONE
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=MODEL.vocab_size,
            hidden_size=b.dim,
            intermediate_size=b.ffn_width,
            num_hidden_layers=b.num_layers,
            num_attention_heads=b.num_heads,
            num_key_value_heads=b.kv_heads,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    everything_visible = torch.zeros(NUM_SEQUENCES, 1, LENGTH, LENGTH)

    def step() -> None:
        corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), MODEL)
        logits = model(input_ids=corruption.x_t_BL, attention_mask=everything_visible).logits
        ce: Tensor = F.cross_entropy(logits.flatten(0, 1), batch.tokens_BL.flatten(), reduction="none")
        weight_BL = (1.0 / corruption.t_BS[:, 0]).float()[:, None] * corruption.masked_BL
        (ce * weight_BL.flatten()).sum().div(corruption.divisor).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())
