"""Token merging one axis at a time: each row of a grid, then each column. Also as QuoTA's code has it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.bipartite import bipartite_matching, cap, merge, merge_weighted
from tokprune.ops.wide import wide


@torch.no_grad()
def merge_line(features: Tensor, keep: int, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bipartite soft matching, at most half of the tokens a round, until `keep` are left.

    features: (B, N, C). size: (B, N, 1) originals in each. Returns means and sizes of what is left, (B, keep, C) and
    (B, keep, 1), the positions (B, keep) at which it sits, ascending, and (B, N) what each input went to.
    """
    x = wide(features)
    size = x.new_ones(*x.shape[:2], 1) if size is None else size
    rep = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    assign = rep
    while x.shape[1] > keep:
        matching = bipartite_matching(x, min(x.shape[1] - keep, max(1, cap(x.shape[1]))), ordered=True)
        x, size = merge_weighted(matching, x, size)
        rep, assign = rep.gather(-1, matching.rep), matching.assign.gather(-1, assign)
    return x, size, rep, assign


def column_heights(grid: tuple[int, int], lengths: list[int]) -> list[int]:
    """Heights of the columns that hold as many tokens as rows of these lengths do; they differ by at most one."""
    count, columns = sum(lengths), min(max(lengths), grid[1])
    return [(i + 1) * count // columns - i * count // columns for i in range(columns)]


@torch.no_grad()
def merge_separable(features: Tensor, grid: tuple[int, int], heights: list[int]) -> tuple[Tensor, Tensor]:
    """Merge every row of the grid to len(heights) tokens, then column j of those to heights[j].

    features: (B, H * W, C). Returns the cells (B, K) at which the outputs sit, ascending, and (B, H * W) the output
    into which each cell flows; an output is the mean of its cells.
    """
    batch, (height, width), columns = features.shape[0], grid, len(heights)
    x, size, rep, to_column = merge_line(features.reshape(batch * height, width, -1), columns)
    # (B * columns, H, C): what was row by row becomes column by column.
    x = x.unflatten(0, (batch, height)).transpose(1, 2)
    size = size.unflatten(0, (batch, height)).transpose(1, 2)
    rep, to_column = (
        rep.unflatten(0, (batch, height)),
        to_column.unflatten(0, (batch, height)),
    )  # (B, H, columns), (B, H, W)
    cells, start = [], 0
    row_slot = torch.empty(
        batch, columns, height, dtype=torch.long, device=x.device
    )  # output of each row's token, by column
    for j, tall in enumerate(heights):
        _, _, rows, assign = merge_line(x[:, j], tall, size[:, j])  # (B, tall), (B, H)
        cells.append(rows * width + rep[:, :, j].gather(1, rows))
        row_slot[:, j] = assign + start
        start += tall
    slots = torch.cat(cells, 1)  # (B, K) by column
    slots, order = slots.sort(-1)
    place = torch.empty_like(order).scatter(1, order, torch.arange(start, device=x.device).expand_as(order))
    outputs = row_slot.transpose(1, 2).gather(2, to_column).flatten(1)  # (B, H * W)
    return slots, place.gather(1, outputs)


@torch.no_grad()
def merge_line_published(features: Tensor, keep: int, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`merge_line` as QuoTA's code has it: every round takes plain means, however many originals the merged ones hold.

    features: (B, N, C). held: (B, N, M) shares of M originals in each, or None for the inputs themselves. Returns what
    is left, (B, keep, C) in ToMe's order, and the shares (B, keep, M).
    """
    x = wide(features)
    if held is None:
        held = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], -1, -1)
    while x.shape[1] > keep:
        matching = bipartite_matching(x, min(x.shape[1] - keep, max(1, cap(x.shape[1]))))
        x, held = merge(matching, x), merge(matching, held)
    return x, held


@torch.no_grad()
def merge_separable_published(features: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`merge_separable` to a rectangle as QuoTA's code has it.

    Returns (B, h * w, C) and the shares (B, h * w, H * W).
    """
    batch, (height, width), (h, w) = features.shape[0], grid, shape
    eye = torch.eye(height * width, dtype=torch.float32, device=features.device).reshape(height, width, -1)
    held = eye.to(wide(features).dtype).expand(batch, -1, -1, -1).flatten(0, 1)
    x, held = merge_line_published(features.reshape(batch * height, width, -1), w, held)  # (B * H, w, ·)
    x, held = (y.unflatten(0, (batch, height)).transpose(1, 2).flatten(0, 1) for y in (x, held))  # (B * w, H, ·)
    x, held = merge_line_published(x, h, held)
    x, held = (y.unflatten(0, (batch, w)).transpose(1, 2).flatten(1, 2) for y in (x, held))
    return x, held
