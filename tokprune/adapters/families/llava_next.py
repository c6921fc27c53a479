"""LLaVA-NeXT and LLaVA-NeXT-Video: a thumbnail and tiles without their padding, newline rows, pooled video frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import frames, pair, plain
from tokprune.adapters.families.llava import COUNTING, config_fields, cropped, words
from tokprune.adapters.families.tiny import TinyParts, tiny_parts
from tokprune.tokens import Layout


@register_family("llava_next", "llava_next_video")
class AnyRes(Family):
    """LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: a thumbnail, then a canvas of tiles without its padding, each
    line closed by a newline row. Traced through the model's own pack_image_features."""

    clips_in_one_tensor = True
    cuts_pictures = True
    tiny_types: tuple[str, ...] = ("llava_next", "llava_next_video")

    def side(self, call: EncoderCall) -> int:
        """Patches along one side of a tile."""
        config = call.vision_config
        return pair(config.image_size)[0] // pair(config.patch_size)[0]

    def patches(self, call: EncoderCall) -> int | None:
        return self.side(call) ** 2

    def tile_counts(self, call: EncoderCall) -> list[int]:
        """Tower pictures of each image, the thumbnail included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes = call.rows_of("image_sizes")
        images = call.kwargs.get("batch_num_images")
        per_sample = [] if images is None else [int(n) for n in images]
        cut = [n == 1 for n in per_sample for _ in range(n)] or [True] * len(sizes)
        pinpoints, tile = call.config.image_grid_pinpoints, pair(call.vision_config.image_size)[0]
        return [
            image_size_to_num_patches(image_size=size, grid_pinpoints=pinpoints, patch_size=tile) if yes else 1
            for size, yes in zip(sizes, cut, strict=True)
        ]

    def pack(self, call: EncoderCall, values: Tensor, fill: float) -> list[Tensor]:
        """Per-patch values (U, patches, C) re-arranged by the model itself; newline rows are `fill`."""
        parts = values.split(self.tile_counts(call))
        newline = values.new_full((values.shape[-1],), fill)
        sizes = call.rows_of("image_sizes")
        base: Any = call.base
        if "onevision" in call.config.model_type:
            ratio = call.option("vision_aspect_ratio")
            return base.pack_image_features(parts, sizes, image_newline=newline, vision_aspect_ratio=ratio)[0]
        return base.pack_image_features(parts, sizes, vision_feature_select_strategy="full", image_newline=newline)[0]

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        if call.modality == "video":
            return self.video_streams(call)
        side, counts, sizes = self.side(call), self.tile_counts(call), call.rows_of("image_sizes")
        tile = pair(call.vision_config.image_size)[0]
        shapes = [canvas_of(size, call.config.image_grid_pinpoints, tile) for size in sizes]
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        zero = torch.zeros(side * side, dtype=torch.float32)
        cell = torch.stack([zero, y.flatten(), x.flatten()], -1)  # (patches, 3): in a tile, y, x
        places = []
        for count, (_, across) in zip(counts, shapes, strict=True):
            number = torch.arange(count - 1)
            one = torch.ones(count - 1, dtype=torch.float32)
            corner = torch.stack([one, number // across * side, number % across * side], -1)
            places += [cell[None], cell + corner[:, None]]
        traced = self.pack(call, torch.cat(places), torch.nan)
        return [
            traced_layout(rows, side, count, shape) for rows, count, shape in zip(traced, counts, shapes, strict=True)
        ]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        per_unit = values.unflatten(0, (-1, self.side(call) ** 2))
        if call.modality == "video":
            return self.video_rows(call, per_unit, fill)
        return torch.cat(self.pack(call, per_unit, fill))

    def candidates(self, call: EncoderCall) -> Tensor | None:
        patches = self.side(call) ** 2 * sum(self.tile_counts(call))
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(0), device="cpu")
        number = order.float() + 1  # means of these are no whole numbers
        packed = torch.cat(self.pack(call, number.view(-1, self.side(call) ** 2, 1), 0.0)).flatten()
        if not torch.equal(packed, packed.round()):  # a large picture of LLaVA-OneVision is resampled: all are seen
            return None
        seen = torch.zeros(patches + 1, dtype=torch.bool, device="cpu")
        seen[packed.long()] = True  # newlines are number 0
        return seen[number.long()]

    def video_shape(self, call: EncoderCall) -> tuple[int, int]:
        """Videos and frames of the call."""
        if call.pixels is None or call.pixels.dim() != 5:
            raise UnknownGeometryError("the call has no video frames")
        return call.pixels.shape[0], call.pixels.shape[1]

    def video_streams(self, call: EncoderCall) -> list[StreamLayout]:
        """LLaVA-NeXT-Video: frames pooled by a stride, no newline."""
        count, length = self.video_shape(call)
        side = self.side(call) // int(call.config.spatial_pool_stride)
        return [plain(frames(length, (side, side))) for _ in range(count)]

    def video_rows(self, call: EncoderCall, values: Tensor, fill: float) -> Tensor:
        """Frames (T, patches, C) as rows. Whatever the pooling mode, a signal is the mean over the pooled patches."""
        side, stride = self.side(call), int(call.config.spatial_pool_stride)
        x = F.avg_pool2d(values.transpose(1, 2).unflatten(2, (side, side)), stride)
        return x.flatten(2).transpose(1, 2).flatten(0, 1)

    def units(self, call: EncoderCall) -> Tensor:
        pixels = call.pixels
        if pixels is None:
            return super().units(call)
        if call.modality == "video":
            return pixels.flatten(0, 1)
        if pixels.dim() == 5:
            return torch.cat([image[:n] for image, n in zip(pixels, self.tile_counts(call), strict=True)])
        return pixels

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = words()
        images = cropped(hf.LlavaNextImageProcessor, image_grid_pinpoints=CANVASES)
        fields = {**config_fields(text), "vision_feature_layer": -2, "image_grid_pinpoints": CANVASES}
        if model_type == "llava_next":
            model = hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(**fields))
            return tiny_parts(model, hf.LlavaNextProcessor(images, text, **COUNTING), "<image>")
        videos = cropped(hf.LlavaNextVideoVideoProcessor, do_sample_frames=False)
        processor = hf.LlavaNextVideoProcessor(videos, images, text, **COUNTING)
        config = hf.LlavaNextVideoConfig(**fields, video_token_index=text.convert_tokens_to_ids("<video>"))
        return tiny_parts(hf.LlavaNextVideoForConditionalGeneration(config), processor, "<image>", "<video>")


def canvas_of(size: Sequence[int], pinpoints: Any, tile: int) -> tuple[int, int]:
    """Tiles of `tile` pixels down and across of an image of `size` (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    down, across = get_anyres_image_grid_shape(size, pinpoints, tile)
    return int(down), int(across)


def traced_layout(rows: Tensor, side: int, count: int, canvas: tuple[int, int]) -> StreamLayout:
    """The layout of one image from its traced patches. rows: (n, 3) in a tile (0 or 1), canvas y, canvas x; newlines
    NaN."""
    newline = torch.isnan(rows[:, 0])
    where = torch.arange(rows.shape[0])
    candidates, separators = where[~newline], where[newline]
    in_tile = rows[candidates, 0] > 0.5
    before = newline.cumsum(0)  # newlines up to here
    line = before[candidates] + in_tile  # line 0 is the thumbnail, which has no newline of its own
    if count == 1:
        layout = Layout.grid(side, side)
        return StreamLayout(candidates, len(where), layout, separators, torch.zeros_like(separators), line)
    # A shrunk canvas has fractional places: the patch that holds the point. 1e-3 outweighs float rounding.
    spot = (rows[candidates, 1:] + 1e-3).floor().long()
    down, across = spot[:, 0], spot[:, 1]
    group = torch.where(in_tile, 1 + down // side * canvas[1] + across // side, 0)
    order = torch.argsort(group, stable=True)
    layout = Layout(
        group[order],
        (down % side)[order],
        (across % side)[order],
        ((side, side),) * count,
        "tiles",
        canvas=canvas,
        thumbnail=True,
    )
    return StreamLayout(candidates[order], len(where), layout, separators, before[separators], line[order])


CANVASES = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
