"""What the splice must know of a vision tower: where its blocks are cut, where q, k and v can be seen, what feeds
the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Ref

ENCODE = (
    "get_image_features",
    "get_video_features",
    "encode_image",
)  # what encodes pictures, in VLMs and in CLIP-like models
Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BlockParts:
    """One transformer block `x += attention(entry(x)); x += after * tail(...(middle(x)))`, by its modules.

    entry: norm before attention. attention: takes the bias of the logits as a keyword. middle: norm before the MLP.
    tail: last module of the MLP branch. after: parameter that multiplies the branch behind `tail`, if any. seen:
    modules whose outputs are recorded, by name. heads: makes queries, keys and values, (B, H, N, hd) or packed (S, H,
    hd), of the record; scale: of the logits.
    """

    block: nn.Module
    entry: nn.Module
    attention: Any
    middle: nn.Module
    tail: nn.Module
    seen: Mapping[str, nn.Module]
    heads: Callable[[Mapping[str, Tensor]], Heads]
    scale: float
    after: Callable[[], Tensor | None] = lambda: None


@dataclass(frozen=True)
class Tower:
    """A vision tower that can be spliced.

    family: for messages. root (by root_ref): module whose call is one run and whose output may list hidden states. depth: how many of
    the blocks feed the output that is used. prefix: leading tokens that are no patches; cls: whether the first of them
    is [CLS]. mask: keyword of the attention module that takes an additive mask; padding: it takes one number per key,
    (B, N), instead. fold: tokens that the connector joins; unit_order: for fold > 1 the (N,) patch numbers unit by unit
    of N patches. packed: all images in one sequence (S, C), with cu_seqlens. pools: the head pools over patches. taps:
    modules that read the output of a block (by number) beside the main path and need its full length. vlm: it feeds a
    language model. intermediates: it has timm's forward_intermediates. grids: packed towers that reorder units: raster
    numbers of the sequence's units, from grid and keywords. owner (by owner_ref): the model that was given; the root may be
    a part of it. patch: the convolution that
    embeds patches; embed: what would enter the first block if patches were `step` times as large, from the picture made
    `step` times smaller: (pixels (B, 3, H, W), grid of the full picture, step) -> (B, n, C). normal: mean and standard
    deviation of the pixels, where the model knows them. rope: for towers whose blocks take the keyword `rope`, a table (N,
    D) of the patches: turns (attention, prefix, table of the rows, queries or keys).
    """

    family: str
    root_ref: Ref
    owner_ref: Ref
    blocks: tuple[BlockParts, ...]
    depth: int
    prefix: int
    cls: bool
    mask: str = "attention_mask"
    padding: bool = False
    fold: int = 1
    unit_order: Callable[[int], Tensor] | None = None
    packed: bool = False
    pools: bool = False
    taps: tuple[tuple[nn.Module, int], ...] = ()
    vlm: bool = False
    intermediates: bool = False
    grids: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    patch: Any = None
    embed: Callable[[Tensor, tuple[int, int], int], Tensor] | None = None
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    rope: Callable[[Any, int, Tensor, Tensor], Tensor] | None = None

    @property
    def root(self) -> Any:
        """The tower's outermost module."""
        return self.root_ref()

    @property
    def owner(self) -> Any:
        """The model that was given."""
        return self.owner_ref()

    def doors(self) -> tuple[tuple[Ref, str], ...]:
        """Methods through which the owner reaches the root, as (object, name); none when it is the root itself."""
        owner = self.owner
        if owner is None or owner is self.root:
            return ()
        holder = owner.base_model if self.vlm else owner
        names = ENCODE if self.vlm else ("forward", "forward_intermediates", *ENCODE)
        return tuple((Ref(holder), name) for name in names if hasattr(holder, name))
