"""Known models without their weights: configs typed from public facts, and how many visual tokens a picture becomes.

Only the numbers that decide cost are in the files under `presets/`; each names its sources. Building a model from one
is `tokprune.profiling.build`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import SimpleNamespace

from tokprune.errors import OptionError, unknown
from tokprune.files import checked
from tokprune.profiling import resolution as res
from tokprune.profiling.formulas import DecoderShape
from tokprune.profiling.published import PublishedReduction
from tokprune.profiling.resolution import Size
from tokprune.types import Fields, JsonObject


@dataclass(frozen=True)
class VisualCount:
    """What a picture or clip becomes: candidate tokens, separators (newline embeddings), passes through the tower."""

    tokens: int
    separators: int
    views: int

    @property
    def placeholders(self) -> int:
        """Columns of the prompt: candidates and separators."""
        return self.tokens + self.separators


@dataclass(frozen=True)
class Preset:
    """One known model: its transformers config as plain data, how it cuts pictures, its published size and the sources.

    published: what papers and projects report of pruning this model, to stand beside our numbers.
    """

    name: str
    title: str
    family: str
    parameters: int
    image: Fields
    config: Fields
    sources: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    published: tuple[PublishedReduction, ...] = ()

    @property
    def decoder(self) -> DecoderShape:
        """The language model's shape, for arithmetic; needs neither torch nor transformers to build anything."""
        return DecoderShape.of(SimpleNamespace(**self.config["text_config"]))

    @property
    def default_size(self) -> Size:
        """(height, width) that tables use unless told otherwise: the papers' own where they name one."""
        return (672, 672) if self.image["kind"] == "anyres" and self.image["tile"] == 336 else (768, 1024)

    def count(self, size: Size, frames: int | None = None) -> VisualCount:
        """Visual tokens of one picture of `size` (height, width), or of a clip of `frames` pictures of that size."""
        if min(size) < 1 or (frames is not None and frames < 1):
            raise OptionError(f"size={size}, frames={frames}; height, width and frames are whole numbers from 1 on.")
        return _COUNTS[self.image["kind"]](self.image, self, size, frames)

    def tokens(self, size: Size, frames: int | None = None) -> int:
        """Candidate tokens alone, of which a ratio is kept."""
        return self.count(size, frames).tokens


def _square(image: Fields, preset: Preset, size: Size, frames: int | None) -> VisualCount:
    side = image["edge"] // image["patch"] // image.get("merge", 1)
    views = frames or 1
    return VisualCount(views * side * side, 0, views)


def _anyres(image: Fields, preset: Preset, size: Size, frames: int | None) -> VisualCount:
    side = image["tile"] // image["patch"]
    if frames is not None:
        pooled = math.ceil(side / image.get("frame_pool", 1))
        return VisualCount(frames * pooled * pooled, 1, frames)
    down, across = anyres_tiles(preset, size)
    rows, cols = res.unpadded_grid((down * side, across * side), size)
    if "max_tiles" in image:
        excess = math.sqrt(rows * cols / (image["max_tiles"] * side * side))
        if excess > 1.1:
            rows, cols = int(rows // excess), int(cols // excess)
    return VisualCount(side * side + rows * cols, rows, 1 + down * across)


def anyres_tiles(preset: Preset, size: Size) -> tuple[int, int]:
    """Tiles down and across that an anyres model (LLaVA-NeXT, OneVision) cuts a picture into."""
    tile = preset.image["tile"]
    height, width = res.best_resolution(size, preset.config["image_grid_pinpoints"])
    return math.ceil(height / tile), math.ceil(width / tile)


def smart_grid(preset: Preset, size: Size, frames: int | None = None) -> tuple[int, int, int]:
    """(groups, rows, columns) of patches before the 2 x 2 merge (Qwen-VL); a group is a picture or a pair of frames."""
    image = preset.image
    most = image["frame_max_pixels"] if frames is not None else image["max_pixels"]
    height, width = res.smart_resize(size, image["patch"] * image["merge"], image["min_pixels"], most)
    groups = 1 if frames is None else math.ceil(frames / image["frames_per_group"])
    return groups, height // image["patch"], width // image["patch"]


def _smart(image: Fields, preset: Preset, size: Size, frames: int | None) -> VisualCount:
    groups, rows, cols = smart_grid(preset, size, frames)
    return VisualCount(groups * rows * cols // image["merge"] ** 2, 0, groups)


def _tiles(image: Fields, preset: Preset, size: Size, frames: int | None) -> VisualCount:
    if frames is not None:
        views = frames
    else:
        if image["kind"] == "tiles":
            down, across = res.tile_canvas(size, (image["tile"],) * 2, image["min_tiles"], image["max_tiles"])
        else:
            height, width = res.tile_multiple(res.longest_edge(size, image["longest"]), image["tile"])
            down, across = height // image["tile"], width // image["tile"]
        views = down * across + (down * across > 1)  # a thumbnail joins more than one tile
    return VisualCount(views * (image["tile"] // image["patch"] // image["merge"]) ** 2, 0, views)


def _fixed(image: Fields, preset: Preset, size: Size, frames: int | None) -> VisualCount:
    return VisualCount(image["tokens"], 0, 1)  # a loaded model whose prompt was measured


_COUNTS: JsonObject = {
    "fixed": _fixed,
    "crop": _square,
    "pad": _square,
    "stretch": _square,
    "anyres": _anyres,
    "smart": _smart,
    "tiles": _tiles,
    "split": _tiles,
}


@lru_cache(maxsize=1)
def _all() -> dict[str, Preset]:
    out = {}
    for file in sorted(resources.files("tokprune.profiling").joinpath("presets").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".json"):
            data = checked(json.loads(file.read_text(encoding="utf-8")), "tokprune.Preset", 1, file.name)
            fields = {k: v for k, v in data.items() if k not in ("type", "version")}
            fields["published"] = map(PublishedReduction.from_dict, data.get("published", ()))
            lists = {k: tuple(fields.get(k, ())) for k in ("sources", "aliases", "published")}
            out[data["name"]] = Preset(**{**fields, **lists})
    return out


def list_presets() -> list[str]:
    """Names of all presets."""
    return list(_all())


def preset(name: str) -> Preset:
    """The preset called `name`; a wrong name raises OptionError with the nearest one and the list."""
    presets = _all()
    wanted = str(name).lower().removeprefix("preset:").replace("_", "-")
    match = presets.get(wanted) or next((p for p in presets.values() if wanted in p.aliases), None)
    if match is None:
        raise unknown("preset", name, presets)
    return match
