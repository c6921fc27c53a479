"""Energy of tokens: how much company a token has among all others (PiToMe, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.distance import cosine_similarity


def energy(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """Mean over all tokens of the cosine above `margin`, softened below it by an ELU. metric: (B, n, d) -> (B, n).

    High: one of many alike (background). Low: alone (an object). A token counts itself.
    """
    return torch.nn.functional.elu(cosine_similarity(metric) - margin, alpha=alpha).mean(-1)
