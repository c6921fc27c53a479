"""Names for what is handed to and fro between tokprune and a model of transformers.

These objects belong to transformers, whose classes differ from model to model; each name says what is relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

ModelCall: TypeAlias = dict[str, Any]
"""The keyword arguments of a forward; transformers has dozens, of every type."""

Positional: TypeAlias = tuple[Any, ...]
"""The positional arguments of a forward, as torch gives them to a hook."""

Replaced: TypeAlias = tuple[Positional, ModelCall] | None
"""What a forward pre-hook returns: other arguments for the forward, or None to leave them."""

Original: TypeAlias = Callable[..., Any]
"""A method of a model that one of ours answers for."""

KVCache: TypeAlias = Any
"""A `transformers.Cache`, or None; pruned ones are of a class made on the fly (`runtime.cache_record`)."""

CacheClass: TypeAlias = Any
"""A class of these."""

ModelOutput: TypeAlias = Any
"""A `transformers.utils.ModelOutput`, a tuple, or None where the forward failed."""

Processor: TypeAlias = Any
"""A `transformers.ProcessorMixin`: tokenizer, image processor and chat template in one; or None."""

Scorer: TypeAlias = Any
"""A text-image scorer: an object with `embed_text` and `embed_picture`, or some of that; or None."""

Model: TypeAlias = Any
"""A module of transformers or timm, whose parts are found by the names in `adapters/`; None when it is gone."""

Mask: TypeAlias = Tensor | Mapping[str, Any] | None
"""An attention mask: (B, keys), (B or 1, H or 1, queries, keys), a dict of these by layer kind, or None: all visible.
"""

RotaryTable: TypeAlias = tuple[Tensor, Tensor | int]
"""Positions (B, P) that rotation gets where attention gets contiguous ones, and filler (B, 1) on the left of each row.
"""


class EncoderOutput(Protocol):
    """What get_image_features and get_video_features return; `deepstack_features` stand beside in some models."""

    pooler_output: Tensor | Sequence[Tensor]
    """One item per tile, image or video: (items, n, D), or a list of (n_i, D)."""
