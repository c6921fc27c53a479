"""Command A Vision: tiles with break tokens between them, thumbnail last, 2 x 2 shuffle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokprune.adapters.families.aya_vision import cohere_language
from tokprune.adapters.families.base import EncoderCall, PlaceholderRun, register_family
from tokprune.adapters.families.tiles import TiledPicture, Tiles, by_picture
from tokprune.adapters.families.tiny import TinyParts, siglip_tower, square, tiny_parts, tokenizer


@register_family("cohere2_vision")
class Cohere2(Tiles):
    """Command A Vision: one break token between the tiles of a picture, thumbnail last."""

    by_pixels = True

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        return (TiledPicture(len(picture)) for picture in by_picture(runs, lambda _, run: len(run.before) != 1))

    def joined_side(self, base: Any, config: Any) -> int:
        return int(config.downsample_factor)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        names = {
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        }
        text = tokenizer(list(names.values()), bos=True, named=names)
        # what this processor calls patch_size is the number of tokens along a tile's side
        tiles: dict[str, Any] = {"size": square(32), "min_patches": 1, "max_patches": 4, "patch_size": 4}
        processor = hf.Cohere2VisionProcessor(
            hf.Cohere2VisionImageProcessor(**tiles),
            text,
        )
        config = hf.Cohere2VisionConfig(
            vision_config=siglip_tower(),
            downsample_factor=2,
            alignment_intermediate_size=128,
            image_token_id=text.convert_tokens_to_ids("<|IMG_PATCH|>"),
            text_config=cohere_language(),
            tie_word_embeddings=True,
        )
        return tiny_parts(hf.Cohere2VisionForConditionalGeneration(config), processor, "<|IMG_PATCH|>")
