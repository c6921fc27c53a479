"""Attention masks of every kind that a model takes, cut to the tokens that are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokprune.adapters.types import Mask
from tokprune.errors import UnsupportedModelError


def check_mask(mask: object) -> None:
    """Refuse a mask that cannot be cut: anything but None, a tensor of two or four dimensions, or a dict of these."""
    if isinstance(mask, Mapping):
        for one in mask.values():
            check_mask(one)
    elif mask is not None and not (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        form = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedModelError(
            "a pruned prompt needs an attention mask whose rows and columns can be cut: a (batch, keys) or (batch, "
            f"heads, queries, keys) tensor, or a dict of these. Given: {form}. Pass the mask as a tensor, or remove "
            "the pruning for this call."
        )


def is_full(mask: Mask) -> bool:
    """Whether a mask says for every query what it sees, instead of which tokens are padding."""
    if isinstance(mask, Mapping):
        return any(m is not None for m in mask.values())
    return isinstance(mask, Tensor) and mask.ndim == 4


def gather_mask(mask: Mask, columns: Tensor, queries: Tensor | None = None, causal: Tensor | None = None) -> Mask:
    """A mask over prompt columns as one over kept keys, with kept queries where they are cut, too.

    mask: (B, keys), (B or 1, H or 1, queries, keys) boolean or additive, None, or a dict of these. columns: (B, P)
    prompt column of each key, -1 for filler, which nobody sees. queries: (B, Q) row of a four-dimensional mask that
    each query is, -1 for filler, which sees everything. causal: (B, 1, Q, P) additive mask for entries of a dict that
    are None.
    """
    check_mask(mask)
    if isinstance(mask, Mapping):
        return {name: gather_mask(one, columns, queries, causal) for name, one in mask.items()}
    if mask is None:
        return causal
    filler = columns < 0
    if mask.ndim == 2:
        keys = mask.to(columns.device).gather(1, columns.clamp(min=0)).masked_fill(filler, 0)  # (B, P)
        return keys if keys.dtype == torch.bool else keys.long()
    batch = columns.shape[0]
    mask = mask.to(columns.device).expand(batch, -1, -1, -1)
    if queries is not None:
        at = queries.clamp(min=0)[:, None, :, None]
        mask = mask.gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
    at = columns.clamp(min=0)[:, None, None]
    mask = mask.gather(3, at.expand(-1, mask.shape[1], mask.shape[2], -1))
    closed = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else 0
    mask = mask.masked_fill(filler[:, None, None], closed)
    if queries is not None:
        mask = mask.masked_fill((queries < 0)[:, None, :, None], 0 if mask.dtype.is_floating_point else 1)
    return mask.contiguous()


def causal_mask(columns: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, length, P) additive mask of the last `length` of P keys as queries: what came before, filler left out."""
    keys = columns.shape[1]
    seen = torch.ones(length, keys, dtype=torch.bool, device=columns.device).tril(keys - length)
    seen = (seen & (columns >= 0)[:, None]) | torch.eye(keys, dtype=torch.bool, device=columns.device)[keys - length :]
    return torch.zeros(seen.shape, dtype=dtype, device=columns.device).masked_fill(~seen, torch.finfo(dtype).min)[
        :, None
    ]
