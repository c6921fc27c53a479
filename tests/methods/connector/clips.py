"""Synthetic clips for the tests of video methods: scenes with a still background, something that moves, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokprune.tokens import Layout, VisualTokens


def clip(
    frames: int, grid: tuple[int, int] = (6, 6), width: int = 16, scenes: int = 3, moving: float = 0.3, seed: int = 0
) -> Tensor:
    """Features of a video, (T, n, C): in each scene the share `moving` of the places changes in every frame."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    out = []
    for part in torch.arange(frames).chunk(scenes):
        background = torch.randn(n, width, generator=g)
        still = torch.rand(n, generator=g) >= moving
        fresh = torch.randn(len(part), n, width, generator=g)
        noise = 0.05 * torch.randn(len(part), n, width, generator=g)
        out.append(torch.where(still[None, :, None], background + noise, fresh))
    return torch.cat(out)


def video(features: Tensor, grid: tuple[int, int], seed: int = 1) -> VisualTokens:
    """The stream of a clip, with an attention of its own."""
    frames, n, _ = features.shape
    layout = Layout.grid(*grid, frames, "video", timestamps=tuple(float(t) for t in range(frames)))
    attention = (2 * torch.randn(frames * n, generator=torch.Generator().manual_seed(seed))).softmax(0)
    return VisualTokens(features.flatten(0, 1), layout, {"cls_attention": attention})


def uneven(sizes: Sequence[tuple[int, int]], holes: int = 0, width: int = 16, seed: int = 2) -> VisualTokens:
    """A video whose frames have grids of different sizes, without its `holes` tokens of lowest random number."""
    g = torch.Generator().manual_seed(seed)
    cells = [torch.arange(h * w) for h, w in sizes]
    group = torch.cat([torch.full_like(c, t) for t, c in enumerate(cells)])
    row = torch.cat([c // w for c, (_, w) in zip(cells, sizes, strict=True)])
    col = torch.cat([c % w for c, (_, w) in zip(cells, sizes, strict=True)])
    layout = Layout(group, row, col, tuple(sizes), "video")
    stays = torch.rand(len(group), generator=g).argsort()[holes:].sort().values
    layout = replace(layout, group=group[stays], row=row[stays], col=col[stays])
    features = torch.randn(len(stays), width, generator=g)
    return VisualTokens(features, layout, {"cls_attention": torch.rand(len(stays), generator=g)})
