"""How much each token mattered for an output of a transformer, from its attention maps and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.ops.numeric import wide


def attention_relevance(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Relevance of every token for every other, by gradient-weighted attention roll-out.

    Layer by layer, from the first: the positive part of attention times gradient, mean over heads, is what flows
    between tokens beside the residual path; these flows are multiplied through (Chefer et al., ICCV 2021, arXiv
    2103.15679, equations 5 and 6). maps: (B, H, N, N) attention of each layer, rows attend to columns. gradients:
    of one output's score with respect to them. Returns (B, N, N): row i says what mattered for token i.
    """
    batch, _, n, _ = maps[0].shape
    relevance = torch.eye(n, dtype=wide(maps[0]).dtype, device=maps[0].device).expand(batch, n, n)
    for attention, gradient in zip(maps, gradients, strict=True):
        flow = (wide(attention) * wide(gradient)).clamp(min=0).mean(1)  # (B, N, N)
        relevance = relevance + flow @ relevance
    return relevance
