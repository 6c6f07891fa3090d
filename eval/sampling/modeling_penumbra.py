"""A model as transformers loads it from an exported folder, with nothing of this project installed.

Shapes: B sequences, L positions, S blocks, D width, d latent width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from model.config import ModelConfig
from model.diffusion import MaskedDiffusion

from .loop import sample
from .settings import SamplingSettings
from .state import SamplerState


def settings_of(kind: Any, tree: Mapping[str, Any]) -> Any:
    """Settings of a class from what `dataclasses.asdict` made of them."""
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in tree.items()})


def _value(hint: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    named = [kind for kind in kinds if len(kinds) == 1 or getattr(kind, "kind", None) == value["kind"]]
    return settings_of(named[0], value)


class PenumbraConfig(PretrainedConfig):
    """config.json of an exported folder.

    Args:
        model: the settings of the model, as model/config.py has them.
        length: positions per row in training.
        eos_token_id: the token that ends a text; None: texts fill their canvas.
    """

    model_type = "penumbra"

    def __init__(
        self, model: dict[str, Any] | None = None, length: int = 0, eos_token_id: int | None = None, **others: Any
    ) -> None:
        super().__init__(**others)
        self.model = model or {}
        self.length = length
        self.eos_token_id = eos_token_id


class PenumbraModel(PreTrainedModel):
    """A masked diffusion model: `forward` predicts hidden tokens, `sample` writes them.

    `model` is the MaskedDiffusion itself, with all that the sampling loop needs.
    """

    config_class = PenumbraConfig
    main_input_name = "input_ids"

    def __init__(self, config: PenumbraConfig) -> None:
        super().__init__(config)
        self.model = MaskedDiffusion(settings_of(ModelConfig, config.model))
        self.post_init()

    @property
    def mask_token_id(self) -> int:
        """The token that hides a position."""
        return self.model.config.mask_id

    def forward(
        self,
        input_ids: Tensor,
        *,
        t: Tensor | None = None,
        latent: Tensor | None = None,
        hint: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Logits [B, L, V] in float32 for every position; those of the mask token are minus infinity.

        Args:
            input_ids: tokens [B, L], the mask token where hidden.
            t: times [B] or [B, S], for models that are told the time and for those with hints.
            latent: z [B, S, d], for models with a latent.
            hint: noisy embeddings z_t [B, L, D], for models with augmentation.

        Raises:
            ValueError: a latent or a hint is missing, or the model has no use for it.
        """
        hidden_BLD = self.model.denoise(input_ids, t=t, latent=latent, hint=hint)
        rows_M = torch.arange(input_ids.numel(), device=input_ids.device)
        logits_MV = self.model.logits(hidden_BLD.flatten(0, 1), rows_M)
        return MaskedLMOutput(logits=logits_MV.unflatten(0, input_ids.shape))

    def sample(self, input_ids: Tensor, *, length: int | None = None, **settings: Any) -> Tensor:
        """Writes a token wherever `input_ids` holds the mask token, and behind it up to `length` positions.

        What the model has written after the first end token that it wrote reads as end tokens.

        Args:
            input_ids: tokens [B, P]; P may be 0.
            length: positions of the result, rounded up to whole blocks; default: the trained length, or more where
                `input_ids` is longer.
            settings: steps, amount, order, temperature (1 unless given), top_p, latent, hints, hint_estimate, seed;
                see settings.py.

        Returns:
            Tokens [B, length]. A row depends on the seed and on its number, not on the other rows.

        Raises:
            ValueError: settings that the model can not serve.
        """
        chosen = SamplingSettings(**{"temperature": 1.0, **settings})
        model, end_id = self.model, self.config.eos_token_id
        num_given, block = input_ids.shape[1], model.config.block_size or 1
        wanted = max(num_given, self.config.length if length is None else length)
        tokens_BL = input_ids.new_full((input_ids.shape[0], -(-wanted // block) * block), self.mask_token_id)
        tokens_BL[:, :num_given] = input_ids
        hidden_BL = tokens_BL == self.mask_token_id
        state = SamplerState.start(tokens_BL, hidden_BL, mask_id=self.mask_token_id, seed=chosen.seed)
        steps = chosen.for_model(model.config).steps or tokens_BL.shape[1]
        written_BL = sample(model, state, chosen.policies(model.config, stop_id=end_id), steps).tokens_BL
        if end_id is None:
            return written_BL
        ended_BL = ((written_BL == end_id) & hidden_BL).cumsum(1) > 0
        return written_BL.masked_fill(ended_BL & hidden_BL, end_id)
