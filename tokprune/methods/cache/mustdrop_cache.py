"""MustDrop's cache: earlier layers forget the keys of tokens that the last stage of dropping did not keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.methods.cache_base import CompactMethod
from tokprune.registry import Checked, register_method


def survivors(held: Tensor, last: Tensor) -> Tensor:
    """(K,) places among the tokens that a layer holds (V,) of those that the last stage kept (K,); both by the same
    ascending numbers.
    """
    return torch.searchsorted(held, last)


@register_method(
    "mustdrop_cache",
    paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    year=2024,
    url="https://arxiv.org/abs/2411.10803",
    complexity="O(V), once behind the prefill",
    memory="none",
    checked=Checked("liuting20/MustDrop", agrees="which keys stay, read from the code", differs="not run beside it"),
)
@dataclass(frozen=True)
class MustDropCache(CompactMethod):
    """MustDrop's output-aware cache policy (2024, section 3.3): stands behind a decoder method that drops in stages.

    Once the prompt is read, the visual keys of the layers from the one below the first stage to the last stage are cut
    to the tokens that the last stage kept; later layers hold no others anyway. Layers below stay whole, as published.
    It follows any decoder method: apply(model, ["mustdrop", "mustdrop_cache"]). Positions of decode steps go on from
    the prompt's in every layer, where the published code counts from each layer's length.
    """

    follows: ClassVar[bool] = True
