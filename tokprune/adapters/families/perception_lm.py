"""Perception LM: a Perception Encoder; pictures (with tiles) and clips go through the same door."""

from __future__ import annotations

from typing import Any

from tokprune.adapters.families.base import EncoderCall, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import pair
from tokprune.adapters.families.tiles import TiledPicture, Tiles
from tokprune.adapters.families.tiny import TinyParts, language, square, tiny_parts, tokenizer


@register_family("perception_lm")
class PerceptionLM(Tiles):
    """Perception LM: the call is (pictures, tiles, 3, H, W), thumbnail first; videos go through the same door."""

    by_pixels = True
    clips_in_one_tensor = True
    mixes_modalities = False
    tower_of_timm = True

    reads_runs = False
    thumbnail_last = False

    def patch_grid(self, call: EncoderCall) -> tuple[int, int]:
        tower: Any = call.base.vision_tower
        embed = getattr(tower.timm_model, "patch_embed", None)
        if embed is None or call.pixels is None:
            raise UnknownGeometryError("its tower has no patches")
        down, across = pair(embed.patch_size)
        return call.pixels.shape[-2] // down, call.pixels.shape[-1] // across

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        pixels, grid = call.pixels, self.token_grid(call)
        if pixels is None or pixels.dim() != 5 or pixels.shape[0] * pixels.shape[1] != self.unit_count(call):
            raise UnknownGeometryError("the pixels are not (pictures, tiles, 3, H, W)")
        items, count = pixels.shape[:2]
        picture = TiledPicture(count, video=call.modality == "video")
        return [self.stream(call, picture, grid, i * count) for i in range(items)]

    def encoder(self, base: Any, modality: str) -> tuple[str, str] | None:
        return "get_image_features", "pixel_values" if modality == "video" else ""

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        marks = {"image_token": "<|image|>", "video_token": "<|video|>"}
        text = tokenizer(list(marks.values()), bos=True, named=marks)
        processor = hf.PerceptionLMProcessor(
            hf.PerceptionLMVideoProcessor(size=square(56), do_sample_frames=False),
            hf.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4),
            text,
            patch_size=14,
            pooling_ratio=2,
        )
        config = hf.PerceptionLMConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_large_patch14_336",
                "do_pooling": True,
                "model_args": {
                    "embed_dim": 32,
                    "img_size": [56, 56],
                    "depth": 2,
                    "num_heads": 4,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [4, 4],
                },
            },
            text_config=language(),
            projector_pooling_ratio=2,
            vision_use_cls_token=True,
            image_token_id=text.convert_tokens_to_ids("<|image|>"),
            video_token_id=text.convert_tokens_to_ids("<|video|>"),
        )
        return tiny_parts(hf.PerceptionLMForConditionalGeneration(config), processor, "<|image|>", "<|video|>")
