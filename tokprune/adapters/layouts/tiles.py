"""Families that cut a picture into tiles of one size: which tiles belong together, and how they lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.layouts.canvas import canvas_from_pixels, canvases
from tokprune.adapters.layouts.core import (
    Call,
    Run,
    StreamLayout,
    UnknownGeometryError,
    frames,
    pair,
    plain,
    tiled,
)
from tokprune.adapters.layouts.grids import Units
from tokprune.tokens import Layout

APART = "which tiles make one picture is not known without the prompt: every tile is a stream of its own"


@dataclass(frozen=True)
class Picture:
    """Consecutive tower units that belong together.

    count: units. across: tiles in a line where the prompt tells it, else 0. video: the units are frames, shown at
    `seconds` where the prompt tells it.
    """

    count: int
    across: int = 0
    video: bool = False
    seconds: tuple[float, ...] | None = None


class Tiles(Units):
    """Several units make one picture, with a thumbnail of the whole when there are more than one."""

    reads_runs = True
    thumbnail_last = True

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        """The pictures that the runs of placeholders tell of; n: tokens of a unit."""
        raise UnknownGeometryError("its prompt is not understood")

    def streams(self, call: Call) -> list[StreamLayout]:
        grid, count = self.token_grid(call), self.unit_count(call)
        if count == 1:
            return [plain(Layout.grid(*grid))]
        n = grid[0] * grid[1]
        if call.runs is None or sum(run.length for run in call.runs) != count * n:
            return [plain(Layout.grid(*grid), APART)] * count
        runs = list(call.runs)
        if self.reads_tags and not any(run.before for run in runs):
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

    reads_tags = True
    """Whether the tokens between the runs are needed, not only their lengths."""

    def stream(self, call: Call, picture: Picture, grid: tuple[int, int], start: int) -> StreamLayout:
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

    def look(self, call: Call, start: int, count: int, thumbnail: int) -> tuple[tuple[int, int], str]:
        """The canvas of the picture whose first unit is `start`, read off its pixels."""
        try:
            units = self.units(call)[start : start + count]
        except UnknownGeometryError:
            return canvases(count - 1)[0], "tiles down and across are guessed"
        others = [i for i in range(count) if i != thumbnail]
        canvas, clear = canvas_from_pixels(units[others], units[thumbnail])
        return canvas, "" if clear else "tiles down and across are guessed: the picture looks alike either way"


class InternVL(Tiles):
    """InternVL: all tiles of a picture are one run, thumbnail last. A video frame is a run of its own; only the words
    before it ("Frame1: ") tell it from a picture, so frames become a video when the call can decode token ids."""

    reads_tags = False
    told_by_words = True

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        frames, following = 0, None
        for run in runs:
            number = _frame_number(call, run)
            if frames and (number != following or run.length != n):
                yield Picture(frames, video=True)
                frames = 0
            if number is not None and run.length == n and (frames or number == 1):
                frames, following = frames + 1, number + 1
            else:
                yield Picture(run.length // n)
        if frames:
            yield Picture(frames, video=True)


def _frame_number(call: Call, run: Run) -> int | None:
    """The n of "Framen: " before a run, or None."""
    if call.decode is None or not run.before:
        return None
    found = re.search(r"Frame(\d+):\s*\S*\s*$", call.decode(list(run.before)))
    return int(found.group(1)) if found else None


class Idefics(Tiles):
    """Idefics3 and SmolVLM: <row_r_col_c> before each tile, <global-img> before the thumbnail, which comes last.

    The tag that stands before the last run of a sample is the thumbnail's, whatever the tokenizer calls it.
    """

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        last = {run.sample: run.before[-1:] for run in runs}
        count, across = 0, 0
        for run in runs:
            if count and not across and len(run.before) > 2:  # a line break before the tag: the first line is complete
                across = count
            count += 1
            if run.before[-1:] == last[run.sample]:
                yield Picture(count, across)
                count, across = 0, 0

    def tokens_per_unit(self, call: Call) -> int:
        # An item of the encoder output holds all tiles of a sample.
        height, width = self.patch_grid(call)
        return height * width // int(call.config.scale_factor) ** 2

    def units(self, call: Call) -> Tensor:
        pixels = super().units(call)
        return pixels[(pixels != 0).flatten(1).any(1)]  # all-zero pictures are padding; the model skips them


class SmolVLM(Idefics):
    """SmolVLM: as Idefics3; video frames are pictures after "Frame from mm:ss:", told apart when ids can be decoded."""

    told_by_words = True

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        index = 0
        seconds: tuple[float, ...] = ()
        for picture in super().pictures(call, runs, n):
            text = "" if call.decode is None or picture.count > 1 else call.decode(list(runs[index].before))
            found = re.search(r"Frame from (\d+):(\d+):[^:]*$", text)
            index += picture.count
            # Between two frames of a video there is nothing but the closing tag and a line break.
            if seconds and not (found and re.match(r"\S+\nFrame from", text)):
                yield Picture(len(seconds), video=True, seconds=seconds)
                seconds = ()
            if found:
                seconds += (60.0 * int(found.group(1)) + int(found.group(2)),)
            else:
                yield picture
        if seconds:
            yield Picture(len(seconds), video=True, seconds=seconds)


class Aya(Tiles):
    """Aya Vision: the tag before the thumbnail, which comes last, is the one before the last run of a sample."""

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        last = {run.sample: run.before[-1:] for run in runs}
        count = 0
        for run in runs:
            count += 1
            if run.before[-1:] == last[run.sample]:
                yield Picture(count)
                count = 0


class Cohere2(Tiles):
    """Command A Vision: one break token between the tiles of a picture, thumbnail last."""

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        count = 0
        for i, run in enumerate(runs):
            if count and (len(run.before) != 1 or run.sample != runs[i - 1].sample):
                yield Picture(count)
                count = 0
            count += 1
        if count:
            yield Picture(count)


class Ovis2(Tiles):
    """Ovis2: thumbnail first; indicator tokens open a picture and end its columns and lines."""

    thumbnail_last = False

    def pictures(self, call: Call, runs: list[Run], n: int) -> Iterator[Picture]:
        opening, _, _, line, _ = call.config.visual_indicator_token_ids
        count, across = 0, 0
        for run in runs:
            if count and opening in run.before:
                yield Picture(count, across or count - 1)
                count, across = 0, 0
            if count > 1 and line in run.before and not across:
                across = count - 1
            count += 1
        if count:
            yield Picture(count, across or count - 1)

    def pooled(self, values: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        stride = -(-source[0] // target[0])  # odd sides are padded at the end
        x = values.transpose(1, 2).unflatten(2, source)
        return F.avg_pool2d(x, stride, ceil_mode=True).flatten(2).transpose(1, 2)


class PerceptionLM(Tiles):
    """Perception LM: the call is (pictures, tiles, 3, H, W), thumbnail first; videos go through the same door."""

    reads_runs = False
    thumbnail_last = False

    def patch_grid(self, call: Call) -> tuple[int, int]:
        tower: Any = call.base.vision_tower
        embed = getattr(tower.timm_model, "patch_embed", None)
        if embed is None or call.pixels is None:
            raise UnknownGeometryError("its tower has no patches")
        down, across = pair(embed.patch_size)
        return call.pixels.shape[-2] // down, call.pixels.shape[-1] // across

    def streams(self, call: Call) -> list[StreamLayout]:
        pixels, grid = call.pixels, self.token_grid(call)
        if pixels is None or pixels.dim() != 5 or pixels.shape[0] * pixels.shape[1] != self.unit_count(call):
            raise UnknownGeometryError("the pixels are not (pictures, tiles, 3, H, W)")
        items, count = pixels.shape[:2]
        picture = Picture(count, video=call.modality == "video")
        return [self.stream(call, picture, grid, i * count) for i in range(items)]


TILES: dict[str, Any] = {
    "internvl": InternVL(),
    "qianfan_ocr": InternVL(),
    "aya_vision": Aya(),
    "cohere2_vision": Cohere2(),
    "idefics3": Idefics(),
    "smolvlm": SmolVLM(),
    "ovis2": Ovis2(),
    "perception_lm": PerceptionLM(),
}
