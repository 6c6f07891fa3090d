"""Text in, text out: prompts become canvases with masked room behind them, and samples become completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data_pipeline.tokenizers import Tokenizer
from model.diffusion import MaskedDiffusion

from .sampling.loop import sample
from .sampling.settings import SamplingSettings
from .sampling.state import SamplerState

Frame = list[tuple[str, str]]
"""One picture of a sample: (token text, prompt | masked | new | known) by position."""


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
    """Completes each prompt on a canvas of `length` positions, prompt included, rounded up to whole blocks.

    Raises:
        ValueError: a prompt leaves no room on the canvas, or the model can not be sampled like that.
    """
    block_size = model.config.block_size or 1
    length = -(-length // block_size) * block_size
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
    policies = settings.policies(model.config, stop_id=tokenizer.end_id)
    final = sample(model, state, policies, settings.for_model(model.config).steps or length, on_step=keep)
    completions = []
    for row, ids in enumerate(encoded):
        text = tokenizer.decode(_until_end(final.tokens_BL[row, len(ids) :].tolist(), tokenizer.end_id))
        frames = _frames([*states, final], row, len(ids), tokenizer) if record_frames else []
        completions.append(Completion(tokenizer.decode(ids), text, frames))
    return completions


def _until_end(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _frames(states: list[SamplerState], row: int, num_prompt: int, tokenizer: Tokenizer) -> list[Frame]:
    """The start, and every step that revealed something in this row, whatever the others of its batch did."""
    shown = states[:1]
    for state in states:
        if not torch.equal(state.masked_BL[row], shown[-1].masked_BL[row]):
            shown.append(state)
    return [_frame(shown[max(0, n - 1)], now, row, num_prompt, tokenizer) for n, now in enumerate(shown)]


def _frame(before: SamplerState, now: SamplerState, row: int, num_prompt: int, tokenizer: Tokenizer) -> Frame:
    frame: Frame = []
    masked, was_masked = now.masked_BL[row].tolist(), before.masked_BL[row].tolist()
    for position, token in enumerate(now.tokens_BL[row].tolist()):
        if position < num_prompt:
            kind = "prompt"
        elif masked[position]:
            kind = "masked"
        else:
            kind = "new" if was_masked[position] else "known"
        frame.append((tokenizer.token_text(token), kind))
    return frame
