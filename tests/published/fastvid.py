"""FastVID as its authors run it, for LLaVA-OneVision and for LLaVA-Video."""

from __future__ import annotations

from torch import Tensor

from tokprune.methods.connector.fastvid import (
    fastvid_choice,
    fastvid_onevision_split,
    fastvid_rows,
    fastvid_split,
    pieces_of,
)
from tokprune.ops.frames import similar_runs
from tokprune.ops.numeric import wide
from tokprune.tokens import Layout, Merge


def fastvid(
    features: Tensor,
    attention: Tensor,
    frames: Tensor,
    ratio: float = 0.1,
    cuts: int = 7,
    tau: float = 0.9,
    share: float = 0.4,
    stride: int = 4,
    beta: float = 0.6,
    model: str = "onevision",
) -> tuple[Tensor, Tensor]:
    """The published code, for LLaVA-OneVision or ("video") for LLaVA-Video, which loses no remainder.

    features: (T, N, C). attention: (T, N). frames: (T, D), one vector per frame. Returns kept positions (K,),
    ascending, and their tokens (K, C).
    """
    count, n, _ = features.shape
    x, per_frame = wide(features).flatten(0, 1), int(ratio * n)
    lengths = similar_runs(frames, cuts, tau)
    salient: list[int] = []
    context: list[int] = []
    for length in lengths:
        if model == "onevision":
            parts = fastvid_onevision_split(per_frame, length, share, stride)
        else:
            parts = fastvid_split(per_frame * length, [n] * length, share, stride, even=False)
        salient, context = salient + parts[0], context + parts[1]
    layout = Layout.grid(1, n, count, "video").to(x.device)
    chosen = fastvid_choice(x, wide(attention).flatten(), layout, salient, context)
    keep = sum(salient) + sum(context)
    indices, rows = fastvid_rows(
        x, *chosen, pieces_of([n] * count, lengths, salient, context), keep, beta, own=model == "onevision"
    )
    return indices, Merge(rows=rows).apply(x, keep)
