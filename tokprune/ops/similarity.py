"""Normalised features, similarities and distances in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.blocks import row_blocks


def most_similar(a: Tensor, b: Tensor, barred: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest product of each row with one of the others, and its place, ties to the lower one; block by block.

    a: (..., N, D), b: (..., K, D). barred: (K,) bool, rows of b that nobody takes. Returns both (..., N).
    """
    values, places = [], []
    for part in row_blocks(a.shape[-2], b.shape[-2]):
        product = a[..., part, :] @ b.mT  # (..., m, K)
        product = product if barred is None else product.masked_fill(barred, -torch.inf)
        place = product.argmax(-1)
        places.append(place)
        values.append(product.gather(-1, place[..., None])[..., 0])
    return (values[0], places[0]) if len(places) == 1 else (torch.cat(values, -1), torch.cat(places, -1))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of all pairs of rows. a: (..., M, D), b: (..., K, D) -> (..., M, K).

    Large matrices are compared by their products, in which what all rows share (a few channels of an LLM's hidden
    states are large everywhere) would leave nothing of small distances in float32; so the first row of b is the origin.
    """
    origin = b[..., :1, :]
    return torch.cdist(a - origin, b - origin)


def unit(features: Tensor, own: bool = False) -> Tensor:
    """Rows of unit length in float32 (float64 stays). features: (..., N, D). A zero row stays zero instead of NaN.

    own: nobody else needs `features`, which may be overwritten: room for many rows takes as long as dividing them.
    """
    wide = features if features.dtype == torch.float64 else features.float()
    length = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    return wide.div_(length) if own else wide / length


def gram(rows: Tensor) -> Tensor:
    """Inner products of all pairs of rows. rows: (..., N, D) -> (..., N, N).

    On a CPU, where time goes with the number of multiplications, half of the symmetric matrix is computed, matrix by
    matrix, and mirrored: 55 to 60 % of the multiplications.
    """
    n = rows.shape[-2]
    tracked = torch.compiler.is_compiling() or (rows.requires_grad and torch.is_grad_enabled())
    if rows.device.type != "cpu" or n < 256 or tracked:
        return rows @ rows.mT
    out = rows.new_empty(*rows.shape[:-1], n)
    for matrix, square in zip(rows.reshape(-1, n, rows.shape[-1]), out.view(-1, n, n), strict=True):
        _fill_gram(matrix.detach(), square)
    return out


def _fill_gram(rows: Tensor, out: Tensor) -> None:
    """`gram` of one (N, D) into `out` (N, N): halves on the diagonal, and the block beside them once."""
    n = len(rows)
    if n <= 256:  # smaller blocks multiply less, but each less efficiently
        torch.mm(rows, rows.T, out=out)
        return
    cut = -(-n // 64) * 32  # the upper half, a multiple of what the processor multiplies at a time
    _fill_gram(rows[:cut], out[:cut, :cut])
    _fill_gram(rows[cut:], out[cut:, cut:])
    torch.mm(rows[:cut], rows[cut:].T, out=out[:cut, cut:])
    out[cut:, :cut] = out[:cut, cut:].T


def cosine_similarity(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Cosine of every pair. a: (..., N, D), b: (..., M, D) or None for a with itself -> (..., N, M)."""
    rows = unit(a)
    return gram(rows) if b is None else rows @ unit(b).transpose(-1, -2)


def cosine_distance(features: Tensor) -> Tensor:
    """1 - cosine of every pair. features: (..., N, D) -> (..., N, N)."""
    cosine = cosine_similarity(features)
    return 1.0 - cosine if cosine.requires_grad else cosine.neg_().add_(1.0)  # in place: the matrix is large
