"""HoliTom's outer stage as its authors run it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.connector.holitom import (
    NEVER,
    holitom_constancy,
    holitom_counts,
    holitom_flow,
    holitom_ratio,
    static_runs,
)
from tokprune.ops.frames import similarity_to, still_and_moving
from tokprune.ops.numeric import wide
from tokprune.tokens import Merge


def holitom(
    features: Tensor, attention: Tensor, retain: float = 0.15, tau: float = 0.8, beta: float | None = 0.6
) -> tuple[Tensor, Tensor, list[int], float]:
    """The published outer stage without its contextual share (D = 0). features: (T, N, C), attention: (T, N).

    Returns the merged tokens (K, C), scene by scene the still ones, then each frame's; the position of each in the
    video; the scenes' lengths; the ratio applied within them.
    """
    frames, n, _ = features.shape
    x = wide(features).flatten(0, 1)
    at = torch.arange(frames * n, device=x.device)
    similarity = similarity_to(x, (at - n).clamp(min=-1), NEVER).unflatten(0, (frames, n))
    lengths, saved = static_runs(similarity[1:] > tau)
    groups = still_and_moving(
        at.unflatten(0, (frames, n)), frames * n, lengths, holitom_constancy(similarity, lengths), tau
    )
    ratio = holitom_ratio(retain, saved, frames * n)
    into, weight = holitom_flow(x, attention.flatten(), groups, holitom_counts(groups, ratio), beta, published=True)
    target, much = groups.flow(into, weight)
    home = groups.home[groups.order][(into == torch.arange(n, device=x.device))[groups.order]]
    row = torch.empty_like(target).scatter(0, home, at[: len(home)])
    out = Merge(target=torch.where(target >= 0, row[target.clamp(min=0)], -1), scale=much).apply(x, len(home))
    return out, home, lengths, ratio
