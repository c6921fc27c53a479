"""Greedy maximum a posteriori choice of a determinantal point process: relevant tokens that span the most volume."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def greedy_map(kernel: Tensor, keep: int, fallback: Tensor) -> Tensor:
    """Pick `keep` items, each adding the most volume to those already picked (incremental Cholesky factor).

    kernel: (B, N, N), symmetric and positive semi-definite. An item whose remaining volume is rounding noise of its own
    diagonal adds nothing: once only such items are left (the kernel's rank is used up), picks follow `fallback` (B, N),
    highest first. Ties go to the lower index; an item is never picked twice.

    Returns (B, keep) in the order of choice. O(K² N) time, O(K N) memory, no host synchronisation.
    """
    batch, n, _ = kernel.shape
    device, dtype = kernel.device, kernel.dtype
    which = torch.arange(batch, device=device)
    own = kernel.diagonal(dim1=-2, dim2=-1)  # (B, N)
    noise = 100 * torch.finfo(dtype).eps * own
    best_first = torch.sort(fallback, dim=-1, descending=True, stable=True).indices
    places = torch.arange(n, device=device, dtype=dtype).expand(batch, n)
    behind = -1 - torch.empty_like(places).scatter(
        -1, best_first, places
    )  # (B, N): below every volume, best nearest to it

    order = torch.empty(batch, keep, dtype=torch.long, device=device)
    factor = torch.zeros(batch, keep, n, dtype=dtype, device=device)
    volume = own.clone()
    for step in range(keep):
        live = volume > noise
        pick = torch.where(live, volume, behind).masked_fill(torch.isneginf(volume), -torch.inf).argmax(-1)  # (B,)
        order[:, step] = pick
        known = (factor[which, :step, pick][:, None] @ factor[:, :step])[:, 0]  # (B, N) = sum over k of c_k[pick] c_k
        scale = live[which, pick] / volume[which, pick].clamp_min(torch.finfo(dtype).tiny).sqrt()
        row = (kernel[which, pick] - known) * scale[:, None]
        factor[:, step] = row
        volume = volume - row * row
        volume[which, pick] = -torch.inf  # stays: only finite values are taken away from it
    return order
