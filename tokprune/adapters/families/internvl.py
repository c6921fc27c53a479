"""InternVL: tiles with a thumbnail last, pixel shuffle; video frames are told from pictures by words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tokprune.adapters.families.base import EncoderCall, PlaceholderRun, register_family
from tokprune.adapters.families.tiles import TILED, TiledPicture, Tiles
from tokprune.adapters.families.tiny import TinyParts, language, square, tiny_parts, tokenizer, tower


@register_family("internvl", "qianfan_ocr")
class InternVL(Tiles):
    """InternVL: all tiles of a picture are one run, thumbnail last. A video frame is a run of its own; only the words
    before it ("Frame1: ") tell it from a picture, so frames become a video when the call can decode token ids."""

    by_pixels = True
    clips_in_one_tensor = True

    reads_tags = False
    frames_by_words = True

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        frames, following = 0, None
        for run in runs:
            number = _frame_number(call, run)
            if frames and (number != following or run.length != n):
                yield TiledPicture(frames, video=True)
                frames = 0
            if number is not None and run.length == n and (frames or number == 1):
                frames, following = frames + 1, number + 1
            else:
                yield TiledPicture(run.length // n)
        if frames:
            yield TiledPicture(frames, video=True)

    def joined_side(self, base: Any, config: Any) -> int:
        return round(1 / config.downsample_ratio)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        names = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        text = tokenizer(list(names.values()), named=names)
        processor = hf.InternVLProcessor(
            hf.GotOcr2ImageProcessor(**TILED),
            text,
            hf.InternVLVideoProcessor(size=square(32), do_sample_frames=False),
            image_seq_length=16,
        )
        config = hf.InternVLConfig(
            vision_config=tower(
                model_type="internvl_vision", num_hidden_layers=3, image_size=[32, 32], patch_size=[4, 4]
            ),
            text_config=language("qwen2"),
            image_token_id=text.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=16,
        )
        return tiny_parts(hf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>", "<video>")


def _frame_number(call: EncoderCall, run: PlaceholderRun) -> int | None:
    """The n of "Framen: " before a run, or None."""
    if call.decode is None or not run.before:
        return None
    number = re.search(r"Frame(\d+):\s*\S*\s*$", call.decode(list(run.before)))
    return int(number.group(1)) if number else None
