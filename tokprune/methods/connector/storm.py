"""STORM's test-time reduction: fewer frames by sampling or averaging, and pooling inside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.budget import equal_spaced
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.ops.frames import raster
from tokprune.ops.grid import centres, even_cells
from tokprune.ops.merge import means
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, Selection, VisualTokens


@register_method(
    "storm",
    paper="STORM: Token-Efficient Long Video Understanding for Multimodal LLMs",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2503.04130",
    complexity="O(ND)",
    memory="O(ND)",
    merges=True,
    checked=Checked(
        "", differs="written after the paper, whose Mamba layer between tower and LLM is trained and not ours"
    ),
)
@dataclass(frozen=True)
class Storm(ConnectorMethod):
    """STORM (ICCV 2025), what it does without training: keep every `stride`-th frame, then pool inside the frames.

    mode "sample": the others are dropped (the paper's temporal token sampling, stride 2). mode "pool": each run of
    `stride` frames becomes its mean (the paper trains with it, stride 4). The frames that are left share the budget
    equally, and each is averaged over as many near-square cells as it may keep. stride is lowered where the frames left
    could not fill the budget, so that every budget is met: 1/stride of all tokens is plain sampling, keeping all
    changes nothing.

    A baseline. STORM's numbers come from a Mamba layer between tower and LLM that writes the dropped frames into the
    kept ones; without it, sampling behind the tower is sampling fewer frames. Frames of different sizes are averaged
    where both have a token. Tiles and pictures do not follow one another in time: they are pooled in space only.
    """

    stride: int = option(2, low=1, hint="2 keeps every other frame.")
    mode: Literal["sample", "pool"] = "sample"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Sample or pool the stream to `keep` tokens."""
        check_keep(keep, len(tokens))
        check_finite(tokens.features, "the visual features")
        layout = tokens.layout.to(tokens.features.device)
        frames, sizes = layout.num_groups, layout.group_sizes
        stride = self.stride if layout.kind == "video" else 1
        while sum(sizes[::stride]) < keep:
            stride -= 1
        shares = iter(equal_spaced(keep, sizes[::stride]))
        budgets = [next(shares) if t % stride == 0 else 0 for t in range(frames)]
        cell = even_cells(layout, budgets)
        middle = centres(cell, keep, layout)
        if self.mode == "pool" and stride > 1:
            cell = _follow(cell, layout, stride)
        return means(middle, cell)


def _follow(cell: Tensor, layout: Layout, stride: int) -> Tensor:
    """The cell of each token, in frames without cells that of the same place in the last frame that has some."""
    places = raster(layout)  # (T, P)
    width = max(w for _, w in layout.grids)
    first = torch.div(layout.group, stride, rounding_mode="floor") * stride
    leader = places[first, layout.row * width + layout.col]
    return torch.where(leader >= 0, cell[leader.clamp(min=0)], -1)
