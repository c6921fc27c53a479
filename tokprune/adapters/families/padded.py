"""Vision towers that see a batch of pictures of their own size, padded to one count of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import frames, plain, pool
from tokprune.tokens import Layout


class Padded(Family):
    """The patches of each picture come first, in raster order; side x side of them become a token."""

    def shapes(self, call: EncoderCall) -> list[tuple[int, int]]:
        """(height, width) in patches of each picture or frame."""
        raise NotImplementedError

    def side(self, call: EncoderCall) -> int:
        """Patches along one side of a token."""
        raise NotImplementedError

    def counts(self, call: EncoderCall) -> list[int]:
        """Frames of each clip; 1 for pictures."""
        return [1] * len(self.shapes(call))

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        side, shapes, out = self.side(call), self.shapes(call), []
        for count in self.counts(call):
            (height, width), *rest = shapes[:count]
            if any(shape != (height, width) for shape in rest):
                raise UnknownGeometryError("frames of a clip differ in size")
            grid, shapes = (height // side, width // side), shapes[count:]
            out.append(plain(frames(count, grid) if call.modality == "video" else Layout.grid(*grid)))
        return out

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        side, shapes = self.side(call), self.shapes(call)
        if values.shape[0] % len(shapes) or values.shape[0] < len(shapes) * max(h * w for h, w in shapes):
            raise UnknownGeometryError(f"{values.shape[0]} rows of the tower are not {len(shapes)} padded pictures")
        rows = []
        for part, (height, width) in zip(values.unflatten(0, (len(shapes), -1)), shapes, strict=True):
            down, across = height // side, width // side
            grid = part[: height * width].unflatten(0, (height, width))[: down * side, : across * side]
            rows.append(pool(grid.flatten(0, 1)[None], (down * side, across * side), (down, across))[0])
        return torch.cat(rows)


@register_family("gemma4")
class Gemma4(Padded):
    """Gemma 4: each patch brings its column and row along, padding -1."""

    def shapes(self, call: EncoderCall) -> list[tuple[int, int]]:
        places = call.kwargs.get(f"{call.modality}_position_ids")
        if places is None:
            raise UnknownGeometryError(f"the call has no {call.modality}_position_ids")
        out = []
        for picture in places.cpu():  # (N, 2)
            real = picture[(picture >= 0).all(-1)]
            width, height = (int(n) + 1 for n in real.amax(0))
            raster = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
            if not torch.equal(picture[: len(real)], raster):
                raise UnknownGeometryError("its patches do not stand in raster order")
            out.append((height, width))
        return out

    def side(self, call: EncoderCall) -> int:
        return int(call.vision_config.pooling_kernel_size)

    def counts(self, call: EncoderCall) -> list[int]:
        given = call.kwargs.get("num_frames_per_video")
        return super().counts(call) if given is None or call.modality != "video" else [int(n) for n in given]


@register_family("lfm2_vl")
class Lfm2VL(Padded):
    """LFM2-VL: SigLIP 2 in native sizes, unshuffled by `downsample_factor`."""

    def shapes(self, call: EncoderCall) -> list[tuple[int, int]]:
        return [(height, width) for height, width in call.rows_of("spatial_shapes")]

    def side(self, call: EncoderCall) -> int:
        return int(call.config.downsample_factor)
