"""MMTok on one picture, with padding that it must not choose."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.connector.mmtok import coverage_rows
from tokprune.ops.select import greedy_coverage


def mmtok(
    projected: Tensor,
    vision: Tensor,
    text: Tensor,
    keep: int,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    exclude: Tensor | None = None,
) -> Tensor:
    """Greedy maximum coverage of words and visual tokens. Shapes as in `coverage_rows` -> (keep,) in the order of
    choice.

    exclude: indices of tokens (padding) that are picked only when no other is left.
    """
    rows = coverage_rows(projected, vision, text, alpha, text_temperature, vision_temperature)
    barred = None
    if exclude is not None:
        barred = torch.zeros(1, rows.shape[-1], dtype=torch.bool, device=rows.device)
        barred[:, exclude.to(rows.device)] = True
    return greedy_coverage(rows[None], keep, barred=barred)[0]
