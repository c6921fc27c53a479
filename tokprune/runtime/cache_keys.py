"""Which keys of a cache are visual, which of them this decode step uses, and the masks cut to these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokprune.methods.cache_base import CacheMethod, CacheStep
from tokprune.runtime.attention_row import check_tensor_mask


@dataclass
class Chosen:
    """The visual keys of a cache and what is used of them now.

    visual: (B, V) physical positions of the visual keys, -1 behind them. rest: (B, R) those of all other keys of the
    prefill. held: keys when this was made. keep: (B,) visual keys to use. width: the largest of them. everything: every
    row uses all of them, so that there is nothing to choose. step: the last decision. keys: (B, M) physical positions
    that this step uses of `total`, -1 for filler; None: all. ragged: rows differ in number, so
    there is filler. filled: there may be some in this step. masks: those of this step, by the mask they were cut from.
    """

    visual: Tensor
    rest: Tensor
    held: int
    keep: Tensor
    width: int
    ragged: bool
    everything: bool = False
    step: CacheStep | None = None
    keys: Tensor | None = None
    total: int = 0
    filled: bool = False
    masks: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    @staticmethod
    def build(visual: Tensor, count: Callable[[int], int]) -> Chosen:
        """From (B, P) bool, the visual keys; counts are read from the device, once per prefill."""
        counts = visual.sum(1)
        sizes = counts.tolist()
        keeps = [min(count(n), n) if n else 0 for n in sizes]

        def positions(where: Tensor) -> Tensor:
            order = torch.argsort((~where).int(), dim=1, stable=True)
            lengths = where.sum(1)
            order = order[:, : int(lengths.max())]
            return order.masked_fill(torch.arange(order.shape[1], device=order.device) >= lengths[:, None], -1)

        ragged = len(set(sizes)) > 1 or len(set(keeps)) > 1
        keep = torch.tensor(keeps, device=visual.device)
        everything = keeps == sizes
        return Chosen(positions(visual), positions(~visual), visual.shape[1], keep, max(keeps), ragged, everything)

    def index(self, fn: Callable[[Tensor], Tensor]) -> Chosen:
        """After `fn` picked or repeated batch rows."""
        return replace(
            self,
            visual=fn(self.visual),
            rest=fn(self.rest),
            keep=fn(self.keep),
            step=None if self.step is None else self.step.index(fn),
            keys=None,
            masks={},
        )

    def decide(self, method: CacheMethod, row: Tensor, total: int) -> None:
        """Choose by `row` (B, n), the newest token's attention to the last n of `total` keys."""
        device = row.device
        visual, rest = self.visual.to(device), self.rest.to(device)
        at = visual - (total - row.shape[1])  # a sliding window has lost the first keys
        attention = row.gather(1, at.clamp(min=0)).masked_fill(at < 0, 0)
        self.step = method.step(attention, self.keep.to(device), self.width, self.step)
        indices = self.step.indices
        picked = visual.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -1)
        new = torch.arange(self.held, total, device=device).expand(row.shape[0], -1)
        self.keys, self.total, self.masks = torch.cat([rest, picked, new], 1), total, {}
        # A method may give some rows more keys than others; only then must the device be asked.
        self.filled = self.ragged or (indices.shape[1] > self.width and row.shape[0] > 1)

    def within(self, length: int) -> tuple[Tensor, bool]:
        """This step's positions among the last `length` keys, -1 for filler, and whether there may be some."""
        if self.keys is None:
            raise ValueError("nothing was chosen in this step.")
        if length == self.total:
            return self.keys, self.filled
        at = self.keys - (self.total - length)
        return at.masked_fill(at < 0, -1), True


def narrow_mask(mask: Tensor | None, index: Tensor, filled: bool, kernel: str, dtype: torch.dtype) -> Tensor | None:
    """A decode step's mask over the keys at `index` (B, M), where -1 is filler. mask: None, (B, n), or (B or 1, 1, 1,
    n).
    """
    if mask is None:
        if not filled:
            return None
        visible = index >= 0
        if "flash" in kernel:
            return visible
        if kernel == "sdpa":
            return visible[:, None, None]
        return torch.zeros(visible.shape, dtype=dtype, device=index.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )[:, None, None]
    check_tensor_mask(mask)
    index = index.to(mask.device)
    rows = mask if mask.ndim == 2 else mask[:, 0, -1]
    rows = rows.expand(index.shape[0], -1).gather(1, index.clamp(min=0))
    if filled:
        closed = torch.finfo(rows.dtype).min if rows.dtype.is_floating_point else 0
        rows = rows.masked_fill(index < 0, closed)
    return rows if mask.ndim == 2 else rows[:, None, None]
