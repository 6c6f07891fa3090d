"""README.md of an exported folder: what the model is, where it comes from, how good it was, how to use it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.size import num_parameters

from ..hooks import json_lines
from ..state import TrainState
from .load import CHECKPOINTS


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says about the run at a checkpoint; empty where the checkpoint lies elsewhere.

    Args:
        name: of the run's folder, or of the checkpoint's.
        recipe: the resolved configuration, YAML.
        commit: of the code that trained it.
        bound: the last validation up to the checkpoint, a line of metrics.jsonl.
    """

    name: str
    recipe: str = ""
    commit: str = ""
    bound: dict[str, Any] | None = None

    @classmethod
    def of(cls, checkpoint: Path, step: int) -> "RunRecord":
        """Reads it."""
        folder = checkpoint.resolve()
        if folder.parent.name != CHECKPOINTS:
            return cls(folder.name)
        run = folder.parents[1]
        metrics, recipe = run / "metrics.jsonl", run / "config.yaml"
        lines = json_lines.read(metrics) if metrics.is_file() else []
        lines = [line for line in lines if line.get("step", 0) <= step]
        commits = [line["commit"] for line in lines if line.get("commit")]
        bounds = [line for line in lines if line.get("kind") == "validation"]
        return cls(
            run.name,
            recipe.read_text() if recipe.is_file() else "",
            commits[-1] if commits else "",
            bounds[-1] if bounds else None,
        )


def model_card(
    model: ModelConfig, state: TrainState, run: RunRecord, *, weights: str, dtype: str, has_tokenizer: bool
) -> str:
    """The text."""
    rows = {"parameters": f"{num_parameters(model):,}", "switches": _switches(model)}
    rows |= {"step": f"{state.step:,} ({state.tokens:,} tokens)", "weights": f"{weights}, {dtype}"}
    if run.bound is not None:
        rows["bound"] = _bound(run.bound)
    rows["commit"] = run.commit or "unknown"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    recipe = f"\n## Recipe\n\n```yaml\n{run.recipe.rstrip()}\n```\n" if run.recipe else ""
    return f"""---
library_name: transformers
tags:
- masked-diffusion
- penumbra
---
# {run.name}, step {state.step:,}

A masked diffusion language model, trained and exported with Penumbra.

| | |
|---|---|
{table}

## Use

{_use(has_tokenizer)}{recipe}"""


def _bound(line: dict[str, Any]) -> str:
    """As the run measured it: with its averaged weights, where it keeps them."""
    kind = line["bound"]
    return (
        f"{kind} {line[kind]:.4f} +- {line[f'{kind}_error']:.4f} nats per token on {line['tokens']:,} held-out tokens, "
        f"measured by the run itself at step {line['step']:,}"
    )


def _switches(model: ModelConfig) -> str:
    if model.autoregressive:
        return "none: autoregressive"
    on = []
    if model.block_size:
        on.append(f"blocks of {model.block_size}")
    if model.latent is not None:
        on.append(f"a latent of {model.latent.dim} per {'block' if model.block_size else 'sequence'}")
    if model.augmentation is not None:
        on.append(f"hints ({model.augmentation.path}, {model.augmentation.fusion})")
    return ", ".join(on) or "none: plain masked diffusion"


def _use(has_tokenizer: bool) -> str:
    lines = ["import torch", "from transformers import AutoModel", "", "folder = ...  # this one", ""]
    lines += ["model = AutoModel.from_pretrained(folder, trust_remote_code=True)"]
    lines += ["start = torch.full((1, 1), model.mask_token_id)"]
    if has_tokenizer:
        lines[1] += ", AutoTokenizer"
        lines[-1] += '  # or tokenizer(text, return_tensors="pt").input_ids'
        lines.insert(6, "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)")
        lines += ["print(tokenizer.batch_decode(model.sample(start, seed=0), skip_special_tokens=True)[0])"]
    else:
        lines += ["print(model.sample(start, seed=0))  # its checkpoint has no tokenizer: token ids in, token ids out"]
    code = "\n".join(lines)
    return f"""It needs torch and transformers; the rest of the code is in this folder, under the Apache License 2.0.

```python
{code}
```

`model.sample` writes a token wherever its input holds the mask token, and behind it up to `length`; settings.py has its
settings. `model(input_ids).logits` predicts every position, and `model.model` is the MaskedDiffusion of diffusion.py.
"""
