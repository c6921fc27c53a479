"""DyCoke's second half: each new token reads the visual keys that matter to it, chosen anew when attention moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.cache_base import CacheMethod, CacheStep, largest
from tokprune.methods.options import Compat, option
from tokprune.registry import Checked, register_method


def attention_moved(attention: Tensor, before: Tensor, similarity: float) -> Tensor:
    """(B,) bool: the cosine of two rows of attention is below `similarity`. attention, before: (B, V)."""
    dot = (attention * before).sum(-1)
    lengths = attention.square().sum(-1) * before.square().sum(-1)
    return dot < similarity * lengths.sqrt()


@register_method(
    "dycoke_cache",
    paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2411.15024",
    complexity="O(VD + V log V) per new token for V visual keys",
    memory="O(V)",
    checked=Checked(
        "KD-TAO/DyCoke",
        agrees="the keys read in each step with compat='published', 300 random answers of eight tokens",
        differs="the default keeps the earlier set where it reads the whole cache; counts, which it rounds down",
    ),
)
@dataclass(frozen=True)
class DyCokeCache(CacheMethod):
    """DyCoke (CVPR 2025), dynamic pruning of the KV cache (section 3.3); its merging of frames is the method `dycoke`.

    In every decode step the attention that the new token pays to the visual keys in layer `layer - 1` (mean over heads)
    names the share 1 - pruning_rate that the layers from `layer` on read in this step. While that attention stays what
    it was in the step before (cosine of at least `similarity`) the set of that step is used again. layer: 3 as
    published. pruning_rate: 0.7 as published (the code's own default is 0.8); `apply(model, "dycoke_cache", ratio=0.3)`
    sets the share instead. Works on pictures, too.

    All keys stay in memory, since a later token may need what this one does not: it is time that the method saves, not
    memory. The prefill is not changed.

    compat="published": when the attention has not changed the published code reads the whole cache in that step, where
    the paper keeps the earlier set. (There: batches of one, image tokens from position 14 on, eager attention in one
    layer; none of that is needed here.)
    """

    pruning_rate: float = option(0.7, low=0, below=1, hint="0.7 leaves out 70 % of the keys.")
    similarity: float = option(0.9, low=-1, high=1)
    compat: Compat = "corrected"

    @property
    def share(self) -> float:
        """Share of the visual keys used in a step."""
        return 1 - self.pruning_rate

    def step(self, attention: Tensor, keep: Tensor, width: int, before: CacheStep | None) -> CacheStep:
        """Choose for one new token per row, or use the earlier set again."""
        fresh = largest(attention, keep, width)
        if before is None:
            return CacheStep(attention, fresh)
        moved = attention_moved(attention, before.attention, self.similarity)[:, None]
        if self.compat == "corrected":
            return CacheStep(attention, torch.where(moved, fresh, before.indices))
        if bool(moved.all()):
            return CacheStep(attention, fresh)
        every = torch.arange(attention.shape[1], device=attention.device).expand(attention.shape[0], -1)
        fresh = torch.nn.functional.pad(fresh, (0, every.shape[1] - fresh.shape[1]), value=-1)
        return CacheStep(attention, torch.where(moved, fresh, every))
