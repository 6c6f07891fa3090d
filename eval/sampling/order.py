"""Which masked positions are revealed first: a score per row of the head, highest first.

Shapes: M masked rows, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor

OrderName = Literal["random", "top_probability", "margin", "entropy", "left_to_right"]


def scores(order: OrderName, log_probs_MV: Tensor, chosen_M: Tensor, random_M: Tensor, rows_M: Tensor) -> Tensor:
    """Scores [M] from the model's own distribution, before temperature and top-p.

    Args:
        order: random; top_probability (of the token chosen); margin (between the best two); entropy (lowest first);
            left_to_right.
        log_probs_MV: log-probabilities.
        chosen_M: tokens chosen at the rows.
        random_M: uniform draws.
        rows_M: where the rows lie in the flattened positions.
    """
    if order == "random":
        return random_M
    if order == "left_to_right":
        return -rows_M.double()
    if order == "top_probability":
        return log_probs_MV.gather(1, chosen_M[:, None])[:, 0].double()
    if order == "margin":
        best = log_probs_MV.topk(2, dim=1).values.exp()
        return (best[:, 0] - best[:, 1]).double()
    return torch.special.entr(log_probs_MV.exp()).sum(1).neg().double()
