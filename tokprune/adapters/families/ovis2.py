"""Ovis2: soft words of a visual vocabulary between indicator tokens, thumbnail first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families.base import EncoderCall, PlaceholderRun, register_family
from tokprune.adapters.families.tiles import TiledPicture, Tiles, by_picture
from tokprune.adapters.families.tiny import VOCAB, WIDTH, TinyParts, language, square, tiny_parts, tokenizer, tower


@register_family("ovis2")
class Ovis2(Tiles):
    """Ovis2: thumbnail first; indicator tokens open a picture and end its columns and lines."""

    thumbnail_last = False

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        opening, _, _, line, _ = call.config.visual_indicator_token_ids
        for picture in by_picture(runs, lambda _, run: opening in run.before):
            tiles = len(picture) - 1
            across = next((i for i, run in enumerate(picture[1:]) if i and line in run.before), tiles)
            yield TiledPicture(len(picture), across)

    def joined_side(self, base: Any, config: Any) -> int:
        return int(config.vision_config.hidden_stride)

    def pooled(self, values: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        stride = -(-source[0] // target[0])  # odd sides are padded at the end
        x = values.transpose(1, 2).unflatten(2, source)
        return F.avg_pool2d(x, stride, ceil_mode=True).flatten(2).transpose(1, 2)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        frame = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
        text = tokenizer(["<image>", "<IMG_ATOM>", *frame])
        processor = hf.Ovis2Processor(
            hf.Ovis2ImageProcessor(size=square(32), crop_to_patches=True, max_patches=4),
            text,
            image_seq_length=16,
        )
        config = hf.Ovis2Config(
            vision_config=tower(image_size=32, vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=len(frame)),
            text_config=language("qwen2"),
            image_token_id=text.convert_tokens_to_ids("<IMG_ATOM>"),
            visual_indicator_token_ids=text.convert_tokens_to_ids(frame),
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            tie_word_embeddings=False,
        )
        return tiny_parts(hf.Ovis2ForConditionalGeneration(config), processor, "<image>")
