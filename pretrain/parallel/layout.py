"""The declarative layout of the transformer: which dimension of which parameter a tensor-parallel engine splits.

column: outputs (dimension 0); row: inputs (dimension 1); vocab: token rows (dimension 0); replicate: nothing;
sequence: nothing, but it acts between the products, where processes may divide the positions: each then has a part of
its gradient.
"""

import re
from typing import Literal

Role = Literal["column", "row", "vocab", "replicate", "sequence"]

TRUNK = r"(denoiser|latent\.(recognition|prior)\.trunk)\."

LAYOUT: tuple[tuple[str, Role], ...] = (
    (r"(denoiser|latent\.recognition\.trunk)\.(embed|head)\.weight", "vocab"),
    (r"latent\.prior\.trunk\.embed\.weight", "replicate"),
    (TRUNK + r"place\.weight", "replicate"),
    (TRUNK + r"blocks\.\d+\.attention\.[qkv]\.(weight|bias)", "column"),
    (TRUNK + r"blocks\.\d+\.attention\.out\.weight", "row"),
    (TRUNK + r"blocks\.\d+\.ffn\.(gate|up)\.weight", "column"),
    (TRUNK + r"blocks\.\d+\.ffn\.down\.weight", "row"),
    (TRUNK + r"(blocks\.\d+\.)?(attention_|ffn_)?norm\.(weight|bias)", "sequence"),
    (TRUNK + r"(blocks\.\d+\.|final_)?modulation\.(weight|bias)", "sequence"),
    (TRUNK + r"time\.(inner|outer)\.(weight|bias)", "replicate"),
    (r"latent\.(recognition|prior)\.(mark|pool\.score|project|head\.(mean|log_std))\.(weight|bias)", "replicate"),
    (r"latent\.embedding\.(inner|outer)\.(weight|bias)", "replicate"),
    (r"augmentation\.(gate|projection\.weight)", "replicate"),
)
"""Point perceptrons are not in it: they are too small to be split."""

SHARDING_UNITS = TRUNK + r"blocks\.\d+"
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
