"""The FSDP2 engine on a mesh of one: what it does with gradients, updates, averages and skipped steps."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig, TransformerConfig
from model.corruption import corrupt
from model.diffusion import StepSchedule
from model.noise import NoiseKey
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.engines.base import Micro
from pretrain.engines.fsdp import FsdpEngine
from pretrain.parallel.mesh import single_process

VOCAB, LENGTH, ROWS = 20, 16, 8
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.3, beta2=0.98)
TAKE, SKIP = torch.tensor(1.0), torch.tensor(0.0)


def make_engine(*, dropout: float = 0.0, seed: int = 0, **train: object) -> FsdpEngine:
    backbone = TransformerConfig(dim=32, num_layers=2, num_heads=2, qkv_bias=True, dropout=dropout)
    model = ModelConfig(backbone=backbone, vocab_size=VOCAB, mask_id=VOCAB - 1)
    settings = TrainConfig(**{"ema_decay": 0.9, **train})  # type: ignore[arg-type]
    return FsdpEngine(model, OPTIM, settings, ParallelConfig(), single_process(), seed=seed)


def micros(engine: FsdpEngine, *, step: int = 0, rows: int = ROWS) -> list[Micro]:
    generator = torch.Generator().manual_seed(step)
    whole = Batch(
        tokens_BL=torch.randint(VOCAB - 1, (ROWS, LENGTH), generator=generator),
        maskable_BL=torch.ones(ROWS, LENGTH, dtype=torch.bool),
        document_BL=torch.zeros(ROWS, LENGTH, dtype=torch.int32),
        positions_BL=torch.arange(LENGTH).expand(ROWS, LENGTH),
        index_B=torch.arange(ROWS) + step * ROWS,
    )
    parts = [whole.rows(start, start + rows) for start in range(0, ROWS, rows)]
    config = engine.model.config
    return [Micro(part, corrupt(part, NoiseKey(0, step, part.index_B), config), StepSchedule()) for part in parts]


def backward(engine: FsdpEngine, parts: Sequence[Micro]) -> float:
    scale = 1.0 / (ROWS * LENGTH)
    terms = [engine.forward_backward(m, scale=scale, last=m is parts[-1]) for m in parts]
    return sum(float(t.loss) for t in terms)


def gradients(engine: FsdpEngine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def snapshot(engine: FsdpEngine) -> dict[str, Tensor]:
    tensors = {f"{group}/{n}": t.clone() for group, named in engine.state_dict().items() for n, t in named.items()}
    steps = {f"step/{n}": s["step"].clone() for n, s in enumerate(engine.optimizer.state.values())}
    return {**tensors, **steps}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def one_step(engine: FsdpEngine, step: int, *, take: Tensor = TAKE) -> None:
    backward(engine, micros(engine, step=step))
    engine.reduce_and_clip(1.0)
    engine.step(lr=1e-2, take=take)
    engine.update_ema(0.9, take=take)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_accumulation_equals_one_big_batch(rows: int) -> None:
    whole, split = make_engine(dropout=0.2), make_engine(dropout=0.2)
    loss = backward(whole, micros(whole))
    assert backward(split, micros(split, rows=rows)) == pytest.approx(loss, rel=1e-6)
    ours = gradients(split)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_scale_multiplies_the_gradient() -> None:
    engine = make_engine()
    (micro,) = micros(engine)
    engine.forward_backward(micro, scale=0.5, last=True)
    half = gradients(engine)
    engine.forward_backward(micro, scale=1.0, last=True)
    for name, gradient in gradients(engine).items():
        torch.testing.assert_close(gradient, 3 * half[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.25, 4.0])
def test_clipping_scales_the_whole_gradient_and_only_when_it_is_too_long(fraction: float) -> None:
    engine = make_engine()
    backward(engine, micros(engine))
    before = gradients(engine)
    plain = float(torch.cat([g.flatten() for g in before.values()]).double().norm())
    norm = engine.reduce_and_clip(fraction * plain)
    assert float(norm) == pytest.approx(plain, rel=1e-6)
    for name, gradient in gradients(engine).items():
        torch.testing.assert_close(gradient, before[name] * min(1.0, fraction), rtol=1e-5, atol=1e-9)


def test_the_update_is_adamw_with_decay_on_matrices_only() -> None:
    engine = make_engine()
    names = list(engine.parameters)
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in engine.parameters.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [twins[n] for n in names if twins[n].dim() >= 2], "weight_decay": OPTIM.weight_decay},
            {"params": [twins[n] for n in names if twins[n].dim() < 2], "weight_decay": 0.0},
        ],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        fused=False,
        foreach=False,
    )
    for step, lr in enumerate([1e-2, 3e-3, 2e-2, 0.0, 1e-2]):
        backward(engine, micros(engine, step=step))
        for name, gradient in gradients(engine).items():
            twins[name].grad = gradient
        for group in reference.param_groups:
            group["lr"] = lr
        engine.step(lr=lr, take=TAKE)
        reference.step()
        assert all(p.grad is None for p in engine.parameters.values())
    for name, parameter in engine.parameters.items():
        torch.testing.assert_close(parameter.detach(), twins[name].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_not_taken_leaves_everything_as_it_was(poison: float) -> None:
    engine, never = make_engine(), make_engine()
    for each in (engine, never):
        one_step(each, 0)
    before = snapshot(engine)
    backward(engine, micros(engine, step=7))
    next(iter(engine.parameters.values())).grad[0, 0] = poison  # type: ignore[index]
    norm = engine.reduce_and_clip(1.0)
    assert not torch.isfinite(norm)
    take = torch.isfinite(norm).float()
    engine.step(lr=1e-2, take=take)
    engine.update_ema(0.9, take=take)
    assert_same(snapshot(engine), before)
    for each in (engine, never):
        one_step(each, 1)
    assert_same(snapshot(engine), snapshot(never))


def test_the_average_follows_its_definition() -> None:
    engine = make_engine()
    plain = {name: p.detach().double() for name, p in engine.parameters.items()}
    for step, decay in enumerate([0.1, 0.5, 0.9, 0.9]):
        backward(engine, micros(engine, step=step))
        engine.step(lr=1e-2, take=TAKE)
        engine.update_ema(decay, take=TAKE)
        plain = {name: decay * plain[name] + (1 - decay) * p.detach() for name, p in engine.parameters.items()}
    for name, average in engine.state_dict()["ema"].items():
        torch.testing.assert_close(average.double(), plain[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_swapped_in_and_out_even_after_an_error() -> None:
    engine = make_engine()
    for step in range(3):
        one_step(engine, step)
    (micro,) = micros(engine, step=9)
    before, plain = snapshot(engine), float(engine.evaluate(micro).loss)
    twin = make_engine()
    twin.load_state_dict({**engine.state_dict(), "model": engine.state_dict()["ema"]}, num_updates=3)
    with engine.ema():
        averaged = float(engine.evaluate(micro).loss)
    assert averaged == float(twin.evaluate(micro).loss)
    assert averaged != plain
    with pytest.raises(KeyboardInterrupt), engine.ema():
        raise KeyboardInterrupt
    assert_same(snapshot(engine), before)
    assert float(engine.evaluate(micro).loss) == plain


def test_without_an_average_there_is_none() -> None:
    engine = make_engine(ema_decay=0.0)
    assert "ema" not in engine.state_dict()
    one_step(engine, 0)
    with engine.ema():
        pass


def test_evaluation_has_no_dropout_and_leaves_no_gradient() -> None:
    noisy, calm = make_engine(dropout=0.5), make_engine()
    (micro,) = micros(calm)
    terms = noisy.evaluate(micro)
    assert float(terms.loss) == float(calm.evaluate(micro).loss)
    assert not terms.loss.requires_grad
    assert all(p.grad is None for p in noisy.parameters.values())
    assert float(noisy.forward_backward(micro, scale=1.0, last=True).loss) != float(terms.loss)


def test_recomputation_changes_nothing() -> None:
    kept, recomputed = make_engine(dropout=0.3), make_engine(dropout=0.3, recompute="full")
    with count_block_calls(recomputed) as calls:
        assert backward(kept, micros(kept, rows=4)) == backward(recomputed, micros(recomputed, rows=4))
    assert len(calls) == 2 * 2 * 2
    assert_same(gradients(kept), gradients(recomputed))


@contextmanager
def count_block_calls(engine: FsdpEngine) -> Iterator[list[None]]:
    calls: list[None] = []
    handles = [b.register_forward_pre_hook(lambda *_: calls.append(None)) for b in engine.model.denoiser.blocks]
    yield calls
    for handle in handles:
        handle.remove()


def test_bf16_computes_low_and_keeps_high() -> None:
    low, high = make_engine(precision="bf16"), make_engine()
    loss_low, loss_high = (backward(each, micros(each)) for each in (low, high))
    assert loss_low != loss_high
    assert loss_low == pytest.approx(loss_high, rel=5e-3)
    assert {t.dtype for t in gradients(low).values()} == {torch.float32}
    assert {t.dtype for named in low.state_dict().values() for t in named.values()} == {torch.float32}


def test_state_goes_over_to_another_engine() -> None:
    engine, other = make_engine(), make_engine(seed=1)
    for step in range(3):
        one_step(engine, step)
    other.load_state_dict(copy.deepcopy(engine.state_dict()), num_updates=3)
    assert_same(snapshot(engine), snapshot(other))
    for each in (engine, other):
        one_step(each, 3)
    assert_same(snapshot(engine), snapshot(other))


def test_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = snapshot(make_engine())
    torch.manual_seed(6)
    assert_same(first, snapshot(make_engine()))
    assert not torch.equal(
        first["model/denoiser.embed.weight"], snapshot(make_engine(seed=1))["model/denoiser.embed.weight"]
    )


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    traces = {}
    for compiled in (False, True):
        engine = make_engine(compile=compiled)
        losses = []
        for step in range(3):
            losses.append(backward(engine, micros(engine, step=step)))
            losses.append(float(engine.reduce_and_clip(1.0)))
            engine.step(lr=1e-2, take=TAKE)
        traces[compiled] = losses
    assert traces[True] == pytest.approx(traces[False], rel=1e-5)


def test_offloading_alone_is_refused() -> None:
    model = ModelConfig(backbone=TransformerConfig(dim=8, num_layers=1, num_heads=1), vocab_size=4, mask_id=3)
    with pytest.raises(ValueError, match=r"parallel\.offload=true shards over processes"):
        FsdpEngine(model, OPTIM, TrainConfig(), ParallelConfig(offload=True), single_process(), seed=0)


def test_the_attention_backend_reaches_the_model_and_is_refused_where_it_can_not_train() -> None:
    for name in ("auto", "sdpa"):
        assert make_engine(attention=name).model.denoiser.attention_backend == name
    with pytest.raises(ValueError, match=r"flex trains on cuda only, not on cpu: set train\.attention=sdpa"):
        make_engine(attention="flex")
