"""How text is sampled, as options: declared once, for every command that samples."""

from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from inspect import Signature, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eval.sampling.settings import SamplingSettings


class RevealAmount(StrEnum):
    """How many positions a step reveals."""

    even = "even"
    cosine = "cosine"
    ancestral = "ancestral"


class RevealOrder(StrEnum):
    """Which masked positions are revealed first."""

    random = "random"
    top_probability = "top_probability"
    margin = "margin"
    entropy = "entropy"
    left_to_right = "left_to_right"


class LatentSource(StrEnum):
    """Where z comes from after a block's first step."""

    kept = "kept"
    redrawn = "redrawn"
    refreshed = "refreshed"


class HintEstimate(StrEnum):
    """How a clean embedding is estimated."""

    soft = "soft"
    hard = "hard"


def sampling_settings(
    *,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Most denoising steps of a block (without blocks, of the whole text).",
            min=1,
            show_default="64; autoregressive: one a token",
        ),
    ] = None,
    order: Annotated[
        RevealOrder | None,
        typer.Option(
            help="Which masked positions are revealed first.",
            show_default="top_probability; random if ancestral; left_to_right if autoregressive",
        ),
    ] = None,
    amount: Annotated[
        RevealAmount,
        typer.Option(
            help="Positions per step: the same number, few at first and many at the end (cosine), or as the reverse "
            "process draws (ancestral, in random order)."
        ),
    ] = RevealAmount.even,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.", min=0.0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the smallest set of tokens with this probability.", max=1.0)
    ] = 1.0,
    latent: Annotated[
        LatentSource,
        typer.Option(
            help="Models with a latent: one z kept per block, redrawn every step, or inferred anew every step."
        ),
    ] = LatentSource.kept,
    hints: Annotated[
        int, typer.Option(help="Models with augmentation: hints that a step averages over, a network call each.", min=1)
    ] = 1,
    hint_estimate: Annotated[
        HintEstimate,
        typer.Option(
            help="The clean embedding that hints move towards: of the most probable token, or the expected one."
        ),
    ] = HintEstimate.hard,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
) -> "SamplingSettings":
    """What the options of a command come to."""
    from eval.sampling.settings import SamplingSettings

    return SamplingSettings(
        steps=steps,
        order=order.value if order else None,
        amount=amount.value,
        temperature=temperature,
        top_p=top_p,
        latent=latent.value,
        hints=hints,
        hint_estimate=hint_estimate.value,
        seed=seed,
    )


def with_sampling(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `sampling_settings`, some with other defaults, for its parameter `sampling`."""
    shared = [
        p.replace(default=defaults.get(p.name, p.default)) for p in signature(sampling_settings).parameters.values()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command).parameters.values() if p.name != "sampling"]

        @wraps(command)
        def run(**values: Any) -> None:
            chosen = {p.name: values.pop(p.name) for p in shared}
            command(**values, sampling=sampling_settings(**chosen))

        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        return run

    return decorate
