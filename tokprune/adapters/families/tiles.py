"""Families that cut a picture into tiles of one size: which tiles belong together, and how they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokprune.adapters.families.base import SHRUNK, EncoderCall, PlaceholderRun, StreamLayout, UnknownGeometryError
from tokprune.adapters.families.geometry import canvas_from_pixels, canvases, frames, plain, shrunk, tiled
from tokprune.adapters.families.tiny import square
from tokprune.adapters.families.units import Units
from tokprune.tokens import Layout

APART = "which tiles make one picture is not known without the prompt: every tile is a stream of its own"


@dataclass(frozen=True)
class TiledPicture:
    """Consecutive tower units that belong together.

    count: units. across: tiles in a line where the prompt tells it, else 0. video: the units are frames, shown at
    `seconds` where the prompt tells it.
    """

    count: int
    across: int = 0
    video: bool = False
    seconds: tuple[float, ...] | None = None


def by_picture(
    runs: Sequence[PlaceholderRun], begins: Callable[[PlaceholderRun, PlaceholderRun], bool]
) -> Iterator[list[PlaceholderRun]]:
    """The runs of each picture: a new one begins with a sample, and where `begins` says so of a run and the next."""
    picture: list[PlaceholderRun] = []
    for run in runs:
        if picture and (run.sample != picture[-1].sample or begins(picture[-1], run)):
            yield picture
            picture = []
        picture.append(run)
    if picture:
        yield picture


def last_tag_ends(runs: Sequence[PlaceholderRun]) -> Iterator[list[PlaceholderRun]]:
    """The same where each picture ends in a thumbnail, whose tag is the one before the last run of a sample."""
    last = {run.sample: run.before[-1:] for run in runs}
    return by_picture(runs, lambda run, _: run.before[-1:] == last[run.sample])


class Tiles(Units):
    """Several units make one picture, with a thumbnail of the whole when there are more than one."""

    reads_runs = True
    thumbnail_last = True
    cuts_pictures = True

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        """The pictures that the runs of placeholders tell of; n: tokens of a unit."""
        raise UnknownGeometryError("its prompt is not understood")

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        grid, count = self.token_grid(call), self.unit_count(call)
        if count == 1:
            return [plain(Layout.grid(*grid))]
        n = grid[0] * grid[1]
        runs = list(call.runs or ())
        told = not self.reads_tags or any(run.before for run in runs)
        if not told or sum(run.length for run in runs) != count * n:
            return [plain(Layout.grid(*grid), APART)] * count
        if any(run.length % n for run in runs):
            raise UnknownGeometryError(f"placeholder runs are no multiples of the {n} tokens of a tile")
        out, start = [], 0
        for picture in self.pictures(call, runs, n):
            out.append(self.stream(call, picture, grid, start))
            start += picture.count
        if start != count:
            raise UnknownGeometryError(f"the prompt tells of {start} tiles, the encoder of {count}")
        return out

    def looks_at(self, call: EncoderCall) -> Tensor | None:
        try:
            looks = self.by_pixels and call.modality == "image" and self.unit_count(call) > 2
            return shrunk(self.units(call)) if looks else None
        except UnknownGeometryError:
            return None

    by_pixels = False
    """Whether only the pixels tell how many tiles lie down and across."""
    reads_tags = True
    """Whether the tokens between the runs are needed, not only their lengths."""

    def stream(self, call: EncoderCall, picture: TiledPicture, grid: tuple[int, int], start: int) -> StreamLayout:
        """The stream of one picture whose first unit is `start`."""
        if picture.video:
            return plain(frames(picture.count, grid, picture.seconds))
        if picture.count == 1:
            return plain(Layout.grid(*grid))
        thumbnail = picture.count - 1 if self.thumbnail_last else 0
        tiles = picture.count - 1
        if picture.across and tiles % picture.across == 0:
            return tiled(picture.count, grid, (tiles // picture.across, picture.across), thumbnail)
        canvas, note = self.look(call, start, picture.count, thumbnail)
        return tiled(picture.count, grid, canvas, thumbnail, note)

    def look(self, call: EncoderCall, start: int, count: int, thumbnail: int) -> tuple[tuple[int, int], str]:
        """The canvas of the picture whose first unit is `start`, read off its pixels."""
        try:
            seen = call.kwargs.get(SHRUNK)
            units = (self.units(call) if seen is None else seen)[start : start + count]
        except UnknownGeometryError:
            return canvases(count - 1)[0], "tiles down and across are guessed"
        others = [i for i in range(count) if i != thumbnail]
        canvas, clear = canvas_from_pixels(units[others], units[thumbnail])
        return canvas, "" if clear else "tiles down and across are guessed: the picture looks alike either way"


TILED: dict[str, Any] = {"size": square(32), "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
