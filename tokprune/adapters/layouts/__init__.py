"""Where the visual tokens of each family lie: tiles, canvases, newline rows, frames, grids.

Adding a family is one entry in `FAMILIES`; models without one get a grid where the counts allow only one reading, else
one line, and a note that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.layouts.core import (
    Call,
    Family,
    Run,
    StreamLayout,
    UnknownGeometryError,
    placeholder_runs,
    plain,
)
from tokprune.adapters.layouts.grids import GRIDS, Fallback
from tokprune.adapters.layouts.llava import LLAVA
from tokprune.adapters.layouts.minicpm import MINICPM
from tokprune.adapters.layouts.molmo import MOLMO
from tokprune.adapters.layouts.qwen import QWEN, Packed
from tokprune.adapters.layouts.tiles import TILES
from tokprune.tokens import Layout

__all__ = [
    "FAMILIES",
    "Call",
    "Family",
    "Run",
    "StreamLayout",
    "UnknownGeometryError",
    "arrange",
    "family_of",
    "placeholder_runs",
    "reads_runs",
    "stream_layouts",
    "told_by_words",
]

FAMILIES: Mapping[str, Family] = LLAVA | QWEN | TILES | GRIDS | MINICPM | MOLMO
"""The families with a geometry of their own, by the `model_type` of their config."""


def family_of(base: nn.Module, kwargs: Mapping[str, Any] | None = None) -> Family:
    """The family of a multimodal base model; unlisted models that are called with grid_thw are read like Qwen-VL."""
    config: Any = base.config
    known = FAMILIES.get(config.model_type)
    if known is not None:
        return known
    return Packed() if any(name.endswith("_grid_thw") for name in kwargs or ()) else Fallback()


def reads_runs(base: nn.Module) -> bool:
    """Whether the layouts of this model depend on the prompt's placeholder runs (tiles that are items of their own)."""
    return family_of(base).reads_runs


def told_by_words(base: nn.Module) -> bool:
    """Whether only the words of the prompt tell this model's video frames from pictures."""
    return family_of(base).told_by_words


def stream_layouts(
    base: nn.Module,
    modality: str,
    kwargs: Mapping[str, Any],
    output: Any,
    runs: Sequence[Run | int] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[StreamLayout]:
    """One layout per stream (an image with all its tiles, or a video), in the order of the flattened encoder rows.

    base: the multimodal base model. modality: "image" or "video". kwargs: keyword arguments of the get_image_features or
    get_video_features call. output: its result. runs: the prompt's placeholder runs of that modality
    (`placeholder_runs`); plain lengths serve where tiles of a picture are contiguous (InternVL), the other tiled
    families also read the tags between the runs. decode: token ids to text, to tell InternVL's video frames from pictures.

    Where the geometry cannot be known each item is one line, and `note` says why.
    """
    given = None if runs is None else tuple(run if isinstance(run, Run) else Run(int(run)) for run in runs)
    call = Call(base, modality, kwargs, output, given, decode)
    name = call.config.model_type
    try:
        found = family_of(base, kwargs).streams(call)
        rows = sum(stream.total for stream in found)
        if rows != call.total:
            raise UnknownGeometryError(f"a geometry of {rows} tokens was expected, the encoder gave {call.total}")
        return found
    except UnknownGeometryError as error:
        note = f"geometry of {name} unknown, one line per item: {error}"
        return [plain(Layout.line(n), note) for n in call.lengths]


def arrange(call: Call, values: Tensor, fill: float = 0.0) -> Tensor:
    """Values of the tower's patches (P, ...) as values of the flattened rows (R, ...); separators get `fill`.

    P counts the patches in the tower's order, special tokens cut. Raises UnknownGeometryError where a family cannot tell.
    """
    tail = values.shape[1:]
    rows = family_of(call.base, call.kwargs).arrange(call, values.reshape(values.shape[0], -1), fill)
    if rows.shape[0] != call.total:
        raise UnknownGeometryError(f"{rows.shape[0]} values were made for {call.total} rows")
    return rows.reshape(rows.shape[0], *tail)
