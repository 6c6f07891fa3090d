"""Text in, text out: prompts become canvases with masked room behind them, and samples become completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from data_pipeline.tokenizers import Tokenizer
from model.config import ModelConfig
from model.diffusion import MaskedDiffusion

from .sampling.amount import Ancestral, Even
from .sampling.choice import TokenChoice
from .sampling.loop import Policies, sample
from .sampling.order import OrderName
from .sampling.state import SamplerState

Frame = list[tuple[str, str]]
"""One picture of a sample: (token text, prompt | masked | new | known) by position."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What a command may choose about sampling; written into every result.

    order: None becomes top_probability with an even amount, and random with the ancestral one.
    """

    steps: int = 64
    amount: Literal["even", "ancestral"] = "even"
    order: OrderName | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order is None:
            object.__setattr__(self, "order", "random" if self.amount == "ancestral" else "top_probability")

    @property
    def always_the_same(self) -> bool:
        """Whether every sample of a prompt is the same text, whatever its draws."""
        same_places = self.steps == 1 or (self.amount == "even" and self.order != "random")
        return self.temperature == 0 and same_places

    def policies(self, model: ModelConfig) -> Policies:
        """The policies of these settings.

        Raises:
            ValueError: a temperature or top_p out of range.
        """
        amount = Ancestral(model.schedule) if self.amount == "ancestral" else Even()
        assert self.order is not None
        return Policies(amount, self.order, TokenChoice(self.temperature, self.top_p))


@dataclass
class Completion:
    """A prompt's completion up to its end token, and the frames of its denoising."""

    prompt: str
    text: str
    frames: list[Frame] = field(default_factory=list)


def complete(
    model: MaskedDiffusion,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    length: int,
    batch_size: int = 32,
    record_frames: bool = False,
) -> list[Completion]:
    """Completes each prompt on a canvas of `length` positions, prompt included.

    Raises:
        ValueError: a prompt leaves no room on the canvas.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max((len(ids) for ids in encoded), default=0)
    if longest >= length:
        raise ValueError(f"a prompt of {longest} tokens leaves no room on a canvas of {length}: raise --length")
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch_size):
        part = encoded[start : start + batch_size]
        completions += _complete_batch(model, tokenizer, part, settings, length, start, record_frames)
    return completions


def _complete_batch(
    model: MaskedDiffusion,
    tokenizer: Tokenizer,
    encoded: list[list[int]],
    settings: SamplingSettings,
    length: int,
    first_index: int,
    record_frames: bool,
) -> list[Completion]:
    mask_id = model.config.mask_id
    tokens_BL = torch.full((len(encoded), length), mask_id)
    prompt_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
    for row, ids in enumerate(encoded):
        tokens_BL[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        prompt_BL[row, : len(ids)] = True
    device = next(model.parameters()).device
    tokens_BL, prompt_BL = tokens_BL.to(device), prompt_BL.to(device)
    state = SamplerState.start(tokens_BL, ~prompt_BL, mask_id=mask_id, seed=settings.seed, first_index=first_index)
    states = [state] if record_frames else []
    keep = states.append if record_frames else None
    final = sample(model, state, settings.policies(model.config), settings.steps, on_step=keep)
    completions = []
    for row, ids in enumerate(encoded):
        text = tokenizer.decode(_until_end(final.tokens_BL[row, len(ids) :].tolist(), tokenizer.end_id))
        frames = [_frame(states, n, row, len(ids), tokenizer) for n in range(len(states))]
        completions.append(Completion(tokenizer.decode(ids), text, frames))
    return completions


def _until_end(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _frame(states: list[SamplerState], n: int, row: int, num_prompt: int, tokenizer: Tokenizer) -> Frame:
    now = states[n]
    before = states[n - 1].masked_BL[row].tolist() if n else now.masked_BL[row].tolist()
    frame: Frame = []
    masked = now.masked_BL[row].tolist()
    for position, token in enumerate(now.tokens_BL[row].tolist()):
        if position < num_prompt:
            kind = "prompt"
        elif masked[position]:
            kind = "masked"
        else:
            kind = "new" if before[position] else "known"
        frame.append((tokenizer.token_text(token), kind))
    return frame
