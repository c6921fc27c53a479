"""Pictures of what a pruning kept, from the records that it left: a sheet for a picture, a strip of frames for a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.runtime.plan import StreamRecord
from tokprune.tokens import Selection
from tokprune.types import ImageLike, Processor
from tokprune.viz import style
from tokprune.viz.geometry import of_processor
from tokprune.viz.merge_map import draw_merge_map
from tokprune.viz.overlay import draw_overlay
from tokprune.viz.sheet import Panel, method_sheet, sheet
from tokprune.viz.strip import frame_strip

LONGEST = 420  # pixels of a panel's longer side


def kept_on_image(
    image: Image.Image,
    records: Mapping[str, StreamRecord],
    processor: Processor,
    *,
    title: str = "",
    subtitle: str = "",
    captions: Mapping[str, str] | None = None,
) -> Image.Image:
    """The picture beside what each run kept of it.

    records: by the name to print, what the pruning notes of the picture (a StreamRecord of `pruning.last.streams`).
    processor: the model's, whose resizing and cropping the patches follow.
    """
    if not records:
        raise OptionError("there is no record to draw; run the pruned model on the picture first.")
    layouts = {len(r.layout.group) for r in records.values()}
    if len(layouts) == 1:
        layout = next(iter(records.values())).layout
        geometry = of_processor(processor, (image.height, image.width), None, layout)
        kept: dict[str, Selection] = {name: record.selection for name, record in records.items()}
        return method_sheet(image, layout, kept, geometry, title=title, subtitle=subtitle, captions=captions)
    panels = []  # an encoder-stage method leaves fewer candidates than the others: each record has its own layout
    for name, record in records.items():
        geometry = of_processor(processor, (image.height, image.width), None, record.layout)
        one = method_sheet(image, record.layout, {name: record.selection}, geometry, captions=captions)
        panels.append(Panel(one, ""))
    return sheet(panels, title, subtitle, 1)


def joined_on_image(
    image: Image.Image,
    records: Mapping[str, StreamRecord],
    maps: Mapping[str, Sequence[Tensor]],
    processor: Processor,
    title: str = "",
    subtitle: str = "",
    captions: Mapping[str, str] | None = None,
) -> Image.Image:
    """The picture beside what each run did: merge maps for methods inside the tower, kept tokens for the others.

    records: as in `kept_on_image`. maps: by the same names, the run's groups of patches (`merge_map.stream_maps`); none for
    methods that work behind the tower.
    """
    if not records:
        raise OptionError("there is no record to draw; run the pruned model on the picture first.")
    original, _ = style.enlarge(style.to_rgb(image), LONGEST)
    first = next(iter(records.values()))
    panels = [Panel(original, "input", f"{len(first.layout.group)} tokens")]
    for name, record in records.items():
        geometry = of_processor(processor, (image.height, image.width), None, record.layout)
        if maps.get(name):
            picture = draw_merge_map(image, list(maps[name]), geometry, longest=LONGEST)
        else:
            picture = draw_overlay(image, record.layout, record.selection, geometry, longest=LONGEST)
        total, count = len(record.layout.group), len(record.selection)
        caption = [f"{count} of {total} tokens ({100 * count / total:.3g} %)", (captions or {}).get(name, "")]
        panels.append(Panel(picture, name, ", ".join(filter(None, caption))))
    return sheet(panels, title, subtitle)


def kept_on_clip(
    frames: NDArray[np.uint8] | Sequence[ImageLike],
    records: Mapping[str, Sequence[StreamRecord]],
    processor: Processor,
    *,
    title: str = "",
) -> list[tuple[str, Image.Image]]:
    """A strip of frames per run, named: each frame with what was kept of it and its share of the budget.

    records: by name, all records of one prompt: one of the whole clip, or one per frame where a model sees a clip as so
    many pictures.
    """
    out = []
    for name, streams in records.items():
        heading = f"{title}: {name}" if title else name
        if len(streams) == 1:
            record = streams[0]
            size = (int(np.asarray(frames[0]).shape[0]), int(np.asarray(frames[0]).shape[1]))
            geometry = of_processor(processor, size, None, record.layout)
            out.append((name, frame_strip(frames, record.layout, record.selection, geometry, title=heading)))
            continue
        panels = []
        for number, (frame, record) in enumerate(zip(frames, streams, strict=True), 1):
            picture = Image.fromarray(np.asarray(frame, dtype=np.uint8))
            geometry = of_processor(processor, (picture.height, picture.width), None, record.layout)
            one = method_sheet(picture, record.layout, {"": record.selection}, geometry, longest=220)
            panels.append(Panel(one, f"frame {number}", f"{record.kept} of {record.total} tokens"))
        out.append((name, sheet(panels, heading)))
    return out
