"""Pictures of what a pruning kept, from its records: a sheet for a picture, a strip of frames for a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.runtime.plan import StreamRecord
from tokprune.types import ImageLike, Processor
from tokprune.viz import style
from tokprune.viz.geometry import of_processor
from tokprune.viz.merge_map import draw_merge_map
from tokprune.viz.overlay import draw_overlay
from tokprune.viz.sheet import Panel, sheet
from tokprune.viz.strip import frame_strip

LONGEST = 420  # pixels of a panel's longer side
MERGES = "Patches of one colour flow into one token, whose own patch has a white frame."


def kept_on_image(
    image: Image.Image,
    records: Mapping[str, StreamRecord],
    processor: Processor,
    *,  # options by name: this is a public entry point
    title: str = "",
    subtitle: str = "",
    captions: Mapping[str, str] | None = None,
    maps: Mapping[str, Sequence[Tensor]] | None = None,
    longest: int = LONGEST,
) -> Image.Image:
    """The picture beside what each run kept of it, or joined inside the vision tower.

    records: by the name to print, what the pruning notes of the picture (a StreamRecord of `pruning.last.streams`); an
    encoder-stage method leaves fewer candidates than the others, so each is drawn on its own layout. processor: the
    model's, whose resizing and cropping the patches follow. captions: a line per run after the count. maps: by the same
    names, the groups of patches that a run joined (`merge_map.stream_maps`); runs without any show what they kept.
    longest: length of each panel's longer side in pixels.
    """
    if not records:
        raise OptionError("there is no record to draw; run the pruned model on the picture first.")
    original, _ = style.enlarge(style.to_rgb(image), longest)
    candidates = dict.fromkeys(len(r.layout.group) for r in records.values())
    panels = [Panel(original, "input", f"{' or '.join(map(str, candidates))} tokens")]
    for name, record in records.items():
        geometry = of_processor(processor, (image.height, image.width), None, record.layout)
        if maps is not None and maps.get(name):
            drawn = draw_merge_map(image, maps[name], geometry, longest=longest)
        else:
            drawn = draw_overlay(image, record.layout, record.selection, geometry, longest=longest)
        count, total, more = len(record.selection), len(record.layout.group), (captions or {}).get(name, "")
        note = f"{count} of {total} tokens ({100 * count / total:.3g} %)"
        panels.append(Panel(drawn, name, f"{note}, {more}" if more else note))
    if maps is None and any(r.selection.weights is not None for r in records.values()):
        subtitle = f"{subtitle}. {MERGES}" if subtitle else MERGES
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
            one = kept_on_image(picture, {"": record}, processor, longest=220)
            panels.append(Panel(one, f"frame {number}", f"{record.kept} of {record.total} tokens"))
        out.append((name, sheet(panels, heading)))
    return out
