"""Aya Vision: tiles and a thumbnail last, 2 x 2 shuffle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokprune.adapters.families.base import EncoderCall, PlaceholderRun, register_family
from tokprune.adapters.families.tiles import TILED, TiledPicture, Tiles, last_tag_ends
from tokprune.adapters.families.tiny import TinyParts, language, siglip_tower, tiny_parts, tokenizer


@register_family("aya_vision")
class Aya(Tiles):
    """Aya Vision: a tag before each tile, thumbnail last."""

    by_pixels = True

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        return (TiledPicture(len(picture)) for picture in last_tag_ends(runs))

    def joined_side(self, base: Any, config: Any) -> int:
        return int(config.downsample_factor)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        marks = [
            "<image>",
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            "TILE",
            "TILE_GLOBAL",
        ]
        text = tokenizer(marks, bos=True)
        processor = hf.AyaVisionProcessor(
            hf.GotOcr2ImageProcessor(**TILED),
            text,
            patch_size=4,
            img_size=32,
            downsample_factor=2,
        )
        config = hf.AyaVisionConfig(
            vision_config=siglip_tower(),
            downsample_factor=2,
            image_token_index=text.convert_tokens_to_ids("<|IMG_PATCH|>"),
            text_config=cohere_language(),
            tie_word_embeddings=True,
        )
        return tiny_parts(hf.AyaVisionForConditionalGeneration(config), processor, "<image>")


def cohere_language() -> dict[str, Any]:
    """Config of a tiny Cohere 2 LLM: one layer with a sliding window, one without."""
    return language("cohere2", head_dim=16, sliding_window=2048, layer_types=["sliding_attention", "full_attention"])
