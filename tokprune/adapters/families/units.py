"""Vision towers that see a batch of equal pictures, or pictures of different sizes one after the other: grids without
tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import frames, pair, plain, pool, scaled_grid
from tokprune.tokens import Layout


@register_family("got_ocr2", "deepseek_vl")
class Units(Family):
    """A tower that works on a batch of equal pictures (images, tiles or frames), each of which becomes a grid of
    tokens."""

    def patch_grid(self, call: EncoderCall) -> tuple[int, int]:
        """(height, width) in patches of one picture."""
        size = getattr(call.vision_config, "patch_size", None)
        if size is None or call.pixels is None or call.pixels.dim() < 4:
            raise UnknownGeometryError("its patch grid is not known")
        down, across = pair(size)
        return call.pixels.shape[-2] // down, call.pixels.shape[-1] // across

    def patches(self, call: EncoderCall) -> int | None:
        height, width = self.patch_grid(call)
        return height * width

    def tokens_per_unit(self, call: EncoderCall) -> int:
        """Rows that one picture becomes."""
        return call.lengths[0] if call.lengths else 0

    def token_grid(self, call: EncoderCall) -> tuple[int, int]:
        """(height, width) in tokens of one picture."""
        n = self.tokens_per_unit(call)
        grid = scaled_grid(self.patch_grid(call), n)
        if grid is None:
            raise UnknownGeometryError(f"{n} tokens do not make a grid of the picture's shape")
        return grid

    def unit_count(self, call: EncoderCall) -> int:
        """How many pictures the rows belong to."""
        n = self.tokens_per_unit(call)
        if n == 0 or call.total % n:
            raise UnknownGeometryError(f"{call.total} rows are no multiple of {n}")
        return call.total // n

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        grid, count = self.token_grid(call), self.unit_count(call)
        pixels = call.pixels
        if call.modality == "video" and pixels is not None and pixels.dim() == 5:
            length = pixels.shape[1]
            return [plain(frames(length, grid)) for _ in range(count // length)]
        return [plain(Layout.grid(*grid)) for _ in range(count)]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        source, target = self.patch_grid(call), self.token_grid(call)
        per_unit = values.unflatten(0, (-1, source[0] * source[1]))
        return self.pooled(per_unit, source, target).flatten(0, 1)

    def pooled(self, values: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        """Mean over the patches of each token. values: (U, patches, C) -> (U, tokens, C)."""
        return pool(values, source, target)

    def units(self, call: EncoderCall) -> Tensor:
        if call.pixels is None or call.pixels.dim() < 4:
            return super().units(call)
        return call.pixels.flatten(0, -4)


class Fallback(Units):
    """Models without an entry of their own: a grid where the counts allow only one reading, else one line."""

    reads_runs = True
    cuts_pictures = True

    def token_grid(self, call: EncoderCall) -> tuple[int, int]:
        pixels = call.pixels
        if pixels is None or pixels.dim() < 4 or len(set(call.lengths)) != 1:
            raise UnknownGeometryError("its items differ in size")
        count = pixels.shape[:-3].numel()
        n, rest = divmod(call.total, count)
        grid = scaled_grid((pixels.shape[-2], pixels.shape[-1]), n)
        if rest or grid is None:
            raise UnknownGeometryError(f"{call.total} tokens of {count} pictures do not make grids")
        return grid

    def tokens_per_unit(self, call: EncoderCall) -> int:
        height, width = self.token_grid(call)
        return height * width

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        if values.shape[0] == call.total:
            return values
        return super().arrange(call, values, fill)


@register_family("fuyu")
class Fuyu(Fallback):
    """Fuyu: no vision tower, every patch of a picture is one linear map away from the LLM; the processor writes a
    newline token of its own behind each line."""

    features_field = "last_hidden_state"


class SizedImages(Family):
    """Towers that pack pictures of different sizes one after the other: Pixtral, and towers fed with target sizes."""

    def patch_grids(self, call: EncoderCall) -> list[tuple[int, int]]:
        """(height, width) in patches of each picture."""
        down, across = pair(call.vision_config.patch_size)
        return [(h // down, w // across) for h, w in call.rows_of("image_sizes")]

    def token_grids(self, call: EncoderCall) -> list[tuple[int, int]]:
        """(height, width) in tokens of each picture."""
        merge = int(getattr(call.config, "spatial_merge_size", 1) or 1)
        return [(h // merge, w // merge) for h, w in self.patch_grids(call)]

    def prefix(self, call: EncoderCall) -> int:
        """Tokens in front of each picture that are no patches."""
        return 0

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        return [plain(Layout.grid(*grid)) for grid in self.token_grids(call)]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        sources, targets, prefix = self.patch_grids(call), self.token_grids(call), self.prefix(call)
        patches = [h * w + prefix for h, w in sources]
        if sum(patches) != values.shape[0]:
            raise UnknownGeometryError(f"{values.shape[0]} rows of the tower are not its {sum(patches)} patches")
        parts = [part[prefix:] for part in values.split(patches)]
        return torch.cat([pool(part[None], a, b)[0] for part, a, b in zip(parts, sources, targets, strict=True)])
