"""The families of models that tokprune knows: one file each, found by being in this folder.

Adding a family is one file with a class under `@register_family`: its placeholders, geometry, vision tower, prompt
facts, and a tiny model for the test matrix. Models without one get a grid where the counts allow only one reading, else
one line, and a note that says so.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.families.base import (
    _FAMILIES,
    EncoderCall,
    Family,
    PlaceholderRun,
    StreamLayout,
    UnknownGeometryError,
    placeholder_runs,
    register_family,
)
from tokprune.adapters.families.geometry import plain
from tokprune.adapters.families.qwen_vl import Packed
from tokprune.adapters.families.units import Fallback
from tokprune.tokens import Layout

__all__ = [
    "FAMILIES",
    "EncoderCall",
    "Family",
    "PlaceholderRun",
    "StreamLayout",
    "UnknownGeometryError",
    "arrange",
    "family_named",
    "family_of",
    "placeholder_runs",
    "register_family",
    "stream_layouts",
    "tiny_families",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

FAMILIES: Mapping[str, Family] = _FAMILIES
"""The registered families by the `model_type` of their config."""

_PACKED, _FALLBACK = Packed(), Fallback()


def family_named(model_type: str) -> Family:
    """The family of a model type; what is known of every model where none is registered."""
    return FAMILIES.get(model_type, _FALLBACK)


def family_of(base: nn.Module, kwargs: Mapping[str, Any] | None = None) -> Family:
    """The family of a multimodal base model; unlisted models that are called with grid_thw are read like Qwen-VL."""
    config: Any = base.config
    if config.model_type not in FAMILIES and any(name.endswith("_grid_thw") for name in kwargs or ()):
        return _PACKED
    return family_named(config.model_type)


def tiny_families() -> list[str]:
    """Model types of which a tiny model can be built, in the order that the test matrix and the pages show."""
    types = {name for family in FAMILIES.values() for name in family.tiny_types}
    first = [name for name in ORDER if name in types]
    return first + sorted(types - set(first))


ORDER = (
    *("llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl"),
)
"""The families that people ask for first."""


def stream_layouts(
    base: nn.Module,
    modality: str,
    kwargs: Mapping[str, Any],
    output: Any,
    runs: Sequence[PlaceholderRun] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[StreamLayout]:
    """One layout per stream (an image with all its tiles, or a video), in the order of the flattened encoder rows.

    base: the multimodal base model. modality: "image" or "video". kwargs: keyword arguments of the get_image_features
    or get_video_features call. output: its result. runs: the prompt's placeholder runs of that modality
    (`placeholder_runs`). decode: token ids to text, to tell InternVL's video frames from pictures.

    Where the geometry cannot be known each item is one line, and `note` says why.
    """
    call = EncoderCall(base, modality, kwargs, output, None if runs is None else tuple(runs), decode)
    name = call.config.model_type
    try:
        layouts = family_of(base, kwargs).streams(call)
        rows = sum(stream.total for stream in layouts)
        if rows != call.total:
            raise UnknownGeometryError(f"a geometry of {rows} tokens was expected, the encoder gave {call.total}")
        return layouts
    except UnknownGeometryError as error:
        note = f"geometry of {name} unknown, one line per item: {error}"
        by_run = [run.length for run in runs or ()]
        pieces = sum(by_run) == call.total and len(by_run) < len(call.lengths)  # items are pieces of pictures
        return [plain(Layout.line(n), note) for n in (by_run if pieces else call.lengths)]


def arrange(call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
    """Values of the tower's patches (P, ...) as values of the flattened rows (R, ...); separators get `fill`.

    P counts the patches in the tower's order, special tokens cut. Raises UnknownGeometryError where a family cannot
    tell.
    """
    tail = values.shape[1:]
    family, flat = family_of(call.base, call.kwargs), values.reshape(values.shape[0], -1)
    try:
        rows = family.arrange(call, flat, fill)
    except (RuntimeError, TypeError, ValueError) as error:
        if call.config.model_type in FAMILIES:
            raise
        # a tower that nobody has looked at may have rows beside its patches
        raise UnknownGeometryError(f"{flat.shape[0]} rows of the tower do not fit: {error}") from error
    if rows.shape[0] != call.total:
        raise UnknownGeometryError(f"{rows.shape[0]} values were made for {call.total} rows")
    return rows.reshape(rows.shape[0], *tail)
