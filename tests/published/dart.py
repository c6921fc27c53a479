"""DART as its authors run it, inside the LLM."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.connector.dart import least_similar, strongest
from tokprune.ops.numeric import wide


def picks_per_pivot(image_tokens: int, pivots: int, reduction: float | None, max_tokens: int | None = None) -> int:
    """How many tokens each pivot takes in the published code; max_tokens, when given, silently wins over
    `reduction`."""
    wanted = image_tokens * (1 - reduction) if max_tokens is None and reduction is not None else max_tokens or 0
    return int(wanted // pivots)


def dart_in_llm(
    hidden: Tensor,
    keys: Tensor,
    image_start: int,
    image_tokens: int,
    per_pivot: int,
    image_pivots: int = 4,
    text_pivots: int = 4,
    visit: Tensor | None = None,
) -> Tensor:
    """The published selection inside the LLM: which image tokens of a sequence stay, as ascending absolute positions.

    hidden: (S, D) normalised hidden states. keys: (H, S, hd) after the rotation; their L1 norm over heads and channels
    ranks tokens. Pivots are the strongest image tokens and the strongest tokens after the image. visit: (P,) order of
    the visit; the published code takes whatever order a Python set has, the default is image pivots, then text pivots,
    each by descending norm. Kept: the image pivots and per_pivot tokens per pivot.
    """
    norms = wide(keys).abs().sum((0, 2))  # (S,)
    end = image_start + image_tokens
    image = image_start + strongest(norms[image_start:end], image_pivots)
    text = end + strongest(norms[end:], text_pivots)
    visit = torch.cat([image, text]) if visit is None else visit
    free = torch.zeros(norms.shape[0], dtype=torch.bool, device=norms.device)
    free[image_start:end] = True
    free[image] = False
    picks = least_similar(hidden, visit, [per_pivot] * len(visit), free)
    return torch.cat([image, picks]).sort().values
