"""The declarative layout of the transformer: which dimension of which parameter a tensor-parallel engine splits.

column: outputs (dimension 0); row: inputs (dimension 1); vocab: token rows (dimension 0); replicate: nothing.
"""

import re
from typing import Literal

Role = Literal["column", "row", "vocab", "replicate"]

LAYOUT: tuple[tuple[str, Role], ...] = (
    (r"denoiser\.(embed|head)\.weight", "vocab"),
    (r"denoiser\.blocks\.\d+\.attention\.[qkv]\.(weight|bias)", "column"),
    (r"denoiser\.blocks\.\d+\.attention\.out\.weight", "row"),
    (r"denoiser\.blocks\.\d+\.ffn\.(gate|up)\.weight", "column"),
    (r"denoiser\.blocks\.\d+\.ffn\.down\.weight", "row"),
    (r"denoiser\.(blocks\.\d+\.)?(attention_|ffn_)?norm\.(weight|bias)", "replicate"),
    (r"denoiser\.(blocks\.\d+\.|final_)?modulation\.(weight|bias)", "replicate"),
    (r"denoiser\.time\.(inner|outer)\.(weight|bias)", "replicate"),
)

SHARDING_UNITS = r"denoiser\.blocks\.\d+"
"""Modules that are gathered, recomputed and compiled one at a time."""


def role_of(name: str) -> Role:
    """The role of a parameter by its canonical name.

    Raises:
        KeyError: the table does not know the name, or knows it twice.
    """
    roles = [role for pattern, role in LAYOUT if re.fullmatch(pattern, name)]
    if len(roles) != 1:
        raise KeyError(f"{name} matches {len(roles)} rows of the layout table")
    return roles[0]
