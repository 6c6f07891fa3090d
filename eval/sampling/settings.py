"""What whoever samples may choose, and the policies that it comes to."""

from dataclasses import dataclass, replace
from typing import Literal

from model.config import ModelConfig

from .amount import Amount, Ancestral, Cosine, Even
from .choice import TokenChoice
from .hints import HintPolicy
from .latents import LatentPolicy
from .loop import Policies
from .order import OrderName

AmountName = Literal["even", "cosine", "ancestral"]

DEFAULT_STEPS = 64


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What a command may choose about sampling; written into every result.

    Args:
        steps: most denoising steps of a block; None: 64, or one for every token of an autoregressive model.
        amount: the same number of positions every step, few at first and many at the end, or the reverse process.
        order: None: left_to_right for an autoregressive model, random with the ancestral amount, else top_probability.
        latent: where z comes from after a block's first step.
        hints: how many hints a step averages over.
        hint_estimate: how z0 is estimated for the next hint.
    """

    steps: int | None = None
    amount: AmountName = "even"
    order: OrderName | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    latent: LatentPolicy = "kept"
    hints: int = 1
    hint_estimate: Literal["soft", "hard"] = "hard"
    seed: int = 0

    @property
    def always_the_same(self) -> bool:
        """Whether a model without latent and hints writes the same text for a prompt, whatever its draws."""
        same_places = self.steps == 1 or (self.amount != "ancestral" and self.order != "random")
        return self.temperature == 0 and same_places

    def for_model(self, model: ModelConfig) -> "SamplingSettings":
        """The same, with what was left open decided."""
        steps = None if model.autoregressive else DEFAULT_STEPS
        order: OrderName = "random" if self.amount == "ancestral" else "top_probability"
        if model.autoregressive:
            order = "left_to_right"
        return replace(self, steps=self.steps or steps, order=self.order or order)

    def policies(self, model: ModelConfig, *, stop_id: int | None = None) -> Policies:
        """The policies of these settings.

        Raises:
            ValueError: a temperature, top_p or number of hints out of range.
        """
        order = self.for_model(model).order
        assert order is not None
        amounts: dict[AmountName, Amount] = {
            "even": Even(),
            "cosine": Cosine(),
            "ancestral": Ancestral(model.schedule),
        }
        return Policies(
            amount=amounts[self.amount],
            order=order,
            choice=TokenChoice(self.temperature, self.top_p),
            latent=self.latent,
            hints=HintPolicy(self.hints, self.hint_estimate),
            stop_id=stop_id,
        )
