"""Which slots of layer 0 the keys of a deeper layer are: the record of one layer, on the record of the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerKeys:
    """The keys of one layer in front of which, or of one below, tokens were dropped."""

    slots: Tensor
    """(B, K) slot of layer 0 that each key is, ascending, -1 for filler."""
    covered: int
    """Slots of layer 0 that this is about; what came behind them is in every layer."""
    has_fill: bool
    """There is filler among the keys."""
    moved: bool = False
    """Positions of kept tokens were moved over the gaps."""
    ordered: bool = True
    """Keys lie in the order of the prompt; not so where each head keeps keys of its own, or some were merged."""

    @property
    def removed(self) -> int:
        """Keys fewer than in layer 0; one number for the whole batch."""
        return self.covered - self.slots.shape[1]

    def columns(self, count: int) -> Tensor:
        """(B, count) slot of layer 0 of every key, those appended since included."""
        known = self.slots.shape[1]
        tail = torch.arange(self.covered, self.covered + count - known, device=self.slots.device)
        return torch.cat([self.slots, tail.expand(self.slots.shape[0], -1)], 1)

    def index(self, fn: Callable[[Tensor], Tensor]) -> LayerKeys:
        """After `fn` picked or repeated batch rows."""
        return replace(self, slots=fn(self.slots))

    def cropped(self, slots: int) -> LayerKeys:
        """After layer 0 lost all but its first `slots`. What is left over of a row becomes filler."""
        stay = (self.slots >= 0) & (self.slots < slots)
        if not self.ordered:
            raise UnsupportedModelError(
                "this cache cannot be cropped back into its prompt: a method of the cache stage keeps other keys in "
                "each head, or merged some. Crop no further than the answer, or start with a new cache."
            )
        if self.moved and not bool(((self.slots >= slots).sum(1) == self.covered - slots).all()):
            raise UnsupportedModelError(
                "this cache cannot be cropped back into a picture that lost tokens inside the LLM: positions were "
                'numbered anew behind it. Give the decoder method positions="keep", or crop no further than the '
                "text behind the picture."
            )
        used = stay.any(0).nonzero()
        width = int(used.max()) + 1 if len(used) else 0
        kept = self.slots.masked_fill(~stay, -1)[:, :width]
        return LayerKeys(kept, slots, bool((kept < 0).any()), self.moved)


def index_all(layers: dict[int, LayerKeys], fn: Callable[[Tensor], Tensor]) -> dict[int, LayerKeys]:
    """The records of all layers after `fn` picked batch rows; layers that share one still do."""
    distinct = {id(keys): keys for keys in layers.values()}
    done = {name: keys.index(fn) for name, keys in distinct.items()}
    return {i: done[id(keys)] for i, keys in layers.items()}
