"""The training loss against a plain full-logit reference (MDLM; VADD Eq. 3), values and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig, ScheduleConfig, TransformerConfig
from model.corruption import MaskSchedule, corrupt, corrupt_uniform_count
from model.diffusion import LossTerms, MaskedDiffusion, StepSchedule
from model.masks import MaskSpec
from model.noise import NoiseKey

VOCABULARY, MASK, LENGTH = 19, 4, 14
BACKBONE = TransformerConfig(dim=16, num_layers=2, num_heads=2)
SMALL = ModelConfig(backbone=BACKBONE, vocab_size=VOCABULARY, mask_id=MASK)
DECODER = TransformerConfig(
    dim=16, num_layers=2, num_heads=4, num_kv_heads=2, norm="rmsnorm", ffn="swiglu", tie_embeddings=True
)
TIMED = TransformerConfig(dim=16, num_layers=2, num_heads=2, condition_dim=8)
CONFIGS = {
    "mdlm": SMALL,
    "decoder": replace(SMALL, backbone=DECODER),
    "timed": replace(SMALL, backbone=TIMED, time_conditioning=True),
    "cosine": replace(SMALL, schedule=ScheduleConfig(kind="cosine")),
    "uniform": replace(SMALL, loss_weight="uniform"),
}


def build(config: ModelConfig) -> MaskedDiffusion:
    model = MaskedDiffusion(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(num_sequences: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(5, VOCABULARY, (num_sequences, LENGTH), generator=generator)
    document_BL = (torch.arange(LENGTH) >= 8).int().repeat(num_sequences, 1)
    maskable_BL = torch.rand(num_sequences, LENGTH, generator=generator) < 0.8
    document_BL[0, -3:], maskable_BL[0, -3:], tokens_BL[0, -3:] = -1, False, 0
    return Batch(
        tokens_BL=tokens_BL,
        maskable_BL=maskable_BL,
        document_BL=document_BL,
        positions_BL=torch.cat((torch.arange(8), torch.arange(6))).repeat(num_sequences, 1),
        index_B=torch.arange(100, 100 + num_sequences),
    )


def reference(model: MaskedDiffusion, batch: Batch, x_t: Tensor, t_B: Tensor, weight_B: Tensor) -> tuple[Tensor, ...]:
    """Loops over every position: -w(t) log softmax over the unmasked vocabulary, where x_t is the mask."""
    hidden = model.denoiser(x_t, t=t_B, mask=MaskSpec(document_BL=batch.document_BL), positions=batch.positions_BL)
    head = model.denoiser.embed.weight if model.denoiser.head is None else model.denoiser.head.weight
    legal = [v for v in range(VOCABULARY) if v != MASK]
    loss_B, total = [], hidden.new_zeros(())
    for b in range(len(x_t)):
        loss = hidden.new_zeros(())
        for position in range(LENGTH):
            if x_t[b, position] != MASK:
                continue
            logits = hidden[b, position] @ head.T
            nats = logits[legal].logsumexp(0) - logits[batch.tokens_BL[b, position]]
            loss, total = loss + weight_B[b] * nats, total + nats
        loss_B.append(loss)
    return torch.stack(loss_B).sum(), total, torch.stack(loss_B)


def gradients(model: MaskedDiffusion, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_loss_and_gradients_equal_a_plain_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    config, batch = CONFIGS[name], batch_of()
    model = build(config).to(dtype)
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    elbo = config.loss_weight == "elbo"
    weight_B = (
        MaskSchedule(config.schedule).weight(corruption.t_BS[:, 0]) if elbo else torch.ones(6, dtype=torch.float64)
    )
    weight_B = weight_B.float().to(dtype)
    loss, total, loss_B = reference(model, batch, corruption.x_t_BL, corruption.t_BS[:, 0], weight_B)
    terms = model(batch, corruption, step=StepSchedule())
    assert terms.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert terms.cross_entropy.item() == pytest.approx(total.item(), rel=tolerance)
    assert torch.allclose(terms.loss_B, loss_B, rtol=tolerance * 3)
    assert not terms.loss_B.requires_grad
    found, expected = gradients(model, terms.loss), gradients(model, loss)
    assert len(found) == len(expected)
    for one, two in zip(found, expected):
        assert (one - two).norm() <= tolerance * two.norm()


def test_linear_weights_are_one_over_t() -> None:
    batch = batch_of()
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), SMALL)
    sequence = corruption.rows_M[: corruption.num_masked] // LENGTH
    assert torch.equal(corruption.weight_M[: corruption.num_masked], (1 / corruption.t_BS[:, 0])[sequence].float())


@pytest.mark.parametrize("function", [corrupt, corrupt_uniform_count])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_micro_batches_add_up_to_the_batch(function, dropout: float) -> None:  # type: ignore[no-untyped-def]
    config = replace(SMALL, backbone=replace(BACKBONE, dropout=dropout))
    model, batch = build(config).double().train(), batch_of()
    key = NoiseKey(0, 3, batch.index_B)

    def terms_of(start: int, stop: int) -> LossTerms:
        part = batch.rows(start, stop)
        return model(part, function(part, key.rows(start, stop), config), step=StepSchedule())

    whole = terms_of(0, 6)
    expected = gradients(model, whole.loss)
    parts = [terms_of(start, stop) for start, stop in ((0, 1), (1, 4), (4, 6))]
    found = gradients(model, sum(part.loss for part in parts))  # type: ignore[arg-type]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    assert sum(part.cross_entropy.item() for part in parts) == pytest.approx(whole.cross_entropy.item(), rel=1e-12)
    assert torch.allclose(torch.cat([part.loss_B for part in parts]), whole.loss_B, rtol=1e-12)
    for one, two in zip(found, expected):
        assert (one - two).norm() <= 1e-12 * two.norm()


def test_dropout_acts_in_training_only() -> None:
    config = replace(SMALL, backbone=replace(BACKBONE, dropout=0.2))
    model, batch = build(config), batch_of()
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), config)
    training = [model.train()(batch, corruption, step=StepSchedule()).loss.item() for _ in range(2)]
    evaluated = model.eval()(batch, corruption, step=StepSchedule()).loss.item()
    assert training[0] == training[1] != evaluated
    assert evaluated == build(SMALL)(batch, corruption, step=StepSchedule()).loss.item()


def test_a_hidden_token_does_not_leak() -> None:
    batch = batch_of()
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), SMALL)
    tokens_BL = torch.where(corruption.masked_BL, 5 + (batch.tokens_BL - 4) % 14, batch.tokens_BL)
    assert (tokens_BL != batch.tokens_BL).any()
    other = replace(batch, tokens_BL=tokens_BL)
    again = corrupt(other, NoiseKey(0, 0, batch.index_B), SMALL)
    assert torch.equal(again.x_t_BL, corruption.x_t_BL)


@torch.no_grad()
def test_denoise_gives_the_hidden_states_of_the_loss() -> None:
    model, batch = build(SMALL), batch_of()
    corruption = corrupt(batch, NoiseKey(0, 0, batch.index_B), SMALL)
    hidden_BLD = model.denoise(
        corruption.x_t_BL, mask=MaskSpec(document_BL=batch.document_BL), positions=batch.positions_BL
    )
    rows_M = corruption.rows_M[: corruption.num_masked]
    logits_MV = model.logits(hidden_BLD.flatten(0, 1)[rows_M], rows_M)
    assert logits_MV.dtype == torch.float32
    assert (logits_MV[:, MASK] == -torch.inf).all()
    nats = -logits_MV.log_softmax(1).gather(1, corruption.targets_M[: corruption.num_masked, None])
    total = model(batch, corruption, step=StepSchedule()).cross_entropy
    assert nats.sum().item() == pytest.approx(total.item(), rel=1e-6)


def test_a_batch_without_masked_positions_has_no_loss_but_gradients() -> None:
    model, batch = build(SMALL), batch_of()
    clean = replace(batch, maskable_BL=torch.zeros_like(batch.maskable_BL))
    terms = model(clean, corrupt(clean, NoiseKey(0, 0, batch.index_B), SMALL), step=StepSchedule())
    assert terms.loss == 0
    assert not any(g.any() for g in gradients(model, terms.loss))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("config", [replace(SMALL, vocab_size=0), replace(SMALL, mask_id=-1)])
def test_a_model_without_vocabulary_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="with_vocabulary"):
        MaskedDiffusion(config)
