"""Parts of a model that a run does not train."""

import re
from collections.abc import Sequence

from torch import nn


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose whole name matches one of the patterns need no gradient from now on.

    Raises:
        ValueError: a pattern matches nothing, or all of them together leave nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        frozen = [name for name in names if re.fullmatch(pattern, name)]
        if not frozen:
            raise ValueError(f"train.freeze: {pattern!r} matches no parameter; there are {', '.join(names[:4])}, ...")
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"train.freeze={list(patterns)} leaves nothing to train: free a part of the model")
