"""PerTile: each tile or frame on its own, with a share of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokprune.budget import equal, share
from tokprune.methods.base import ConnectorMethod, Wrapper, check_finite, check_keep, select_in_parts
from tokprune.methods.connector.globalcom2 import crop_scales
from tokprune.methods.connector.hired import hired_budgets
from tokprune.methods.connector.wrappers.base import wrapped
from tokprune.methods.options import option
from tokprune.ops.grid import check_canvas
from tokprune.ops.numeric import wide
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


@register_method(
    "per_tile",
    paper="wrapper: each tile or frame on its own, with a share of the budget",
    complexity="the method's, per tile",
    memory="the method's",
    wrapper=True,
)
@dataclass(frozen=True)
class PerTile(Wrapper):
    """Run the method on each tile or frame as on a picture of its own.

    split says who gets how much of the exact total: "equal": as much each (FasterVLM, VisPruner, CDPruner and VisionZip
    do so); what a small tile cannot take flows on. "proportional": in proportion to the tokens that unpadding left.
    "hired": HiRED's: `alpha` to the thumbnail, the rest by the early attention to each tile's region. "globalcom2":
    GlobalCom2's: the thumbnail keeps the overall ratio, a tile more or less by the last block's [CLS] scores of its
    region; scaled to the exact total. The last two read a thumbnail; streams without one (a plain picture, the frames
    of a video) are split equally. A tile whose share is 0 (a budget below the number of tiles) drops out.
    """

    method: ConnectorMethod = wrapped()
    split: Literal["equal", "proportional", "hired", "globalcom2"] = "equal"
    alpha: float = option(0.5, low=0, high=1, hint="It is the thumbnail's share of the budget.")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method needs, and the [CLS] row that the split reads."""
        own = {"hired": ("cls_attention:0",), "globalcom2": ("cls_logits:-1",)}.get(self.split, ())
        return tuple(dict.fromkeys([*self.method.needs, *own]))

    def shares(self, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each tile or frame may keep; the sum is `keep`."""
        layout = tokens.layout
        sizes = layout.group_sizes
        if self.split == "proportional":
            return share(keep, sizes, sizes)
        if self.split == "equal" or not layout.thumbnail or layout.num_groups == 1:
            return equal(keep, sizes)
        name = "cls_attention:0" if self.split == "hired" else "cls_logits:-1"
        row = check_finite(wide(tokens.signal(name)), f"the signal {name}")
        layout = layout.to(row.device)
        if self.split == "hired":
            out: list[int] = hired_budgets(row, layout, keep, self.alpha).tolist()
            return out
        own = layout.group_slices()[0]
        shown = row.new_zeros(layout.grids[0]).index_put((layout.row[own], layout.col[own]), row[own])
        ratio = keep / len(tokens)
        density = [ratio, *crop_scales(shown, check_canvas(layout), ratio).tolist()]
        return share(keep, [d * n for d, n in zip(density, sizes, strict=True)], sizes)

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams: all tiles of all of them go to the method in one call."""
        parts = []
        for tokens, keep in zip(batch, keeps, strict=True):
            check_keep(keep, len(tokens))
            parts.append(list(zip(tokens.layout.group_slices(), self.shares(tokens, keep), strict=True)))
        return select_in_parts(self.method, batch, parts)
