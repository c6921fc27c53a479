"""What one layer's q, k and v tell about each token: a row of the attention map in O(N C), not the O(H N²) of the whole
map."""

from __future__ import annotations

import torch
from torch import Tensor


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split channels into heads in float32 (float64 stays). x: (..., S, C) -> (..., H, S, C / H)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.unflatten(-1, (heads, -1)).transpose(-2, -3)


def cls_logits(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Scaled scores of the first query ([CLS]) with all keys, before the softmax.

    q, k: (..., S, C) outputs of the layer's projections, unscaled, [CLS] first. heads: 1 takes all channels as one
    head. Returns (..., H, S) in float32.
    """
    first, keys = _heads(q[..., :1, :], heads), _heads(k, heads)
    return (first @ keys.transpose(-1, -2))[..., 0, :] * keys.shape[-1] ** -0.5


def cls_row(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """What [CLS] pays to each patch: softmax over all S = N + 1 keys, then the [CLS] column dropped, not renormalised.

    q, k: (..., N + 1, C) outputs of the layer's projections, unscaled, [CLS] first. Returns (..., H, N) in float32.
    """
    return cls_logits(q, k, heads).softmax(-1)[..., 1:]


def received(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Attention that each token receives: the softmax map's mean over heads and over all queries.

    q, k: (..., S, C) -> (..., S) in float32. Heads are taken one by one, so that one S x S map is alive at a time.
    """
    queries, keys = _heads(q, heads), _heads(k, heads)
    scale = keys.shape[-1] ** -0.5
    total = torch.zeros_like(keys[..., 0, :, 0])
    for head in range(heads):
        scores = queries[..., head, :, :] @ keys[..., head, :, :].transpose(-1, -2) * scale
        total = total + scores.softmax(-1).mean(-2)
    return total / heads
