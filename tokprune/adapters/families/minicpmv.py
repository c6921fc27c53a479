"""MiniCPM-V 4.6: a thumbnail and slices of any size, packed, with a merger inside the tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.families.base import (
    EncoderCall,
    PlaceholderRun,
    StreamLayout,
    UnknownGeometryError,
    register_family,
)
from tokprune.adapters.families.geometry import canvas_from_shape, frames, mixed_tiles, plain, pool
from tokprune.adapters.families.tiles import APART, by_picture
from tokprune.adapters.families.tiny import TinyParts, hybrid_language, tiny_parts, tokenizer, tower
from tokprune.adapters.families.units import SizedImages
from tokprune.tokens import Layout


@register_family("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
class MiniCPM(SizedImages):
    """A thumbnail, then slices of one size; each is a run of its own. What stands before a run tells thumbnails from
    slices: the first run of every sample is a thumbnail (or a frame)."""

    mixes_modalities = False

    reads_runs = True

    def patch_grids(self, call: EncoderCall) -> list[tuple[int, int]]:
        name = "target_sizes_videos" if call.modality == "video" else "target_sizes"
        return [(h, w) for h, w in call.rows_of(name)]

    def token_grids(self, call: EncoderCall) -> list[tuple[int, int]]:
        grids = self.patch_grids(call)
        merge = round((sum(h * w for h, w in grids) / max(call.total, 1)) ** 0.5)
        return [(h // merge, w // merge) for h, w in grids]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        patches, targets = self.patch_grids(call), self.token_grids(call)
        # Behind the tower's own merger there is a quarter of the patches left.
        shrink = round((sum(h * w for h, w in patches) / max(values.shape[0], 1)) ** 0.5)
        sources = [(h // shrink, w // shrink) for h, w in patches]
        parts = values.split([h * w for h, w in sources])
        return torch.cat([pool(part[None], a, b)[0] for part, a, b in zip(parts, sources, targets, strict=True)])

    def feature_layers(self, call: EncoderCall) -> list[int] | None:
        return None

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        grids = self.token_grids(call)
        if len(grids) == 1:
            return [plain(Layout.grid(*grids[0]))]
        runs = call.runs
        if runs is None or [run.length for run in runs] != [h * w for h, w in grids] or not any(r.before for r in runs):
            return [plain(Layout.grid(*grid), APART) for grid in grids]
        video, first = call.modality == "video", {run.sample: run.before[-1:] for run in reversed(runs)}

        def begins(_: PlaceholderRun, run: PlaceholderRun) -> bool:
            # Frames of one video follow each other with nothing but an end and a start tag between them.
            return len(run.before) != 2 if video else run.before[-1:] == first[run.sample]

        units = iter(grids)
        return [self.picture([next(units) for _ in part], video) for part in by_picture(runs, begins)]

    def picture(self, grids: list[tuple[int, int]], video: bool) -> StreamLayout:
        """One picture of these units, the thumbnail first, or one video of these frames."""
        count, tile = len(grids), grids[-1]
        if count == 1:
            return plain(Layout.grid(*tile))
        if video:
            if len(set(grids)) > 1:
                raise UnknownGeometryError("frames are cut into slices")
            return plain(frames(count, tile))
        return plain(mixed_tiles(grids, canvas_from_shape(count - 1, tile, grids[0])))

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        names = {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        }
        text = tokenizer(list(names.values()), named=names)
        views: dict[str, Any] = {"scale_resolution": 64, "patch_size": 4}
        processor = hf.MiniCPMV4_6Processor(
            hf.MiniCPMV4_6ImageProcessor(max_slice_nums=4, **views),
            hf.MiniCPMV4_6VideoProcessor(max_slice_nums=1, do_sample_frames=False, **views),
            text,
        )
        config = hf.MiniCPMV4_6Config(
            vision_config=tower(num_hidden_layers=3, image_size=64),
            insert_layer_id=1,
            image_size=64,
            image_token_id=text.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=text.convert_tokens_to_ids("<|video_pad|>"),
            text_config=hybrid_language(),
        )
        model = hf.MiniCPMV4_6ForConditionalGeneration(config)
        return tiny_parts(model, processor, "<|image_pad|>", "<|video_pad|>")
