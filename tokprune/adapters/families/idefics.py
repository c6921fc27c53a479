"""Idefics3 and SmolVLM: tiles between tags that name row and column, thumbnail last, pixel shuffle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, PlaceholderRun, register_family
from tokprune.adapters.families.tiles import TiledPicture, Tiles, last_tag_ends
from tokprune.adapters.families.tiny import TinyParts, language, tiny_parts, tokenizer, tower


@register_family("idefics3")
class Idefics(Tiles):
    """Idefics3 and SmolVLM: <row_r_col_c> before each tile, <global-img> before the thumbnail, which comes last."""

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        for picture in last_tag_ends(runs):
            # A line break before a tag: the line of tiles is complete.
            across = next((i for i, run in enumerate(picture) if i and len(run.before) > 2), 0)
            yield TiledPicture(len(picture), across)

    def tokens_per_unit(self, call: EncoderCall) -> int:
        # An item of the encoder output holds all tiles of a sample.
        height, width = self.patch_grid(call)
        return height * width // int(call.config.scale_factor) ** 2

    def units(self, call: EncoderCall) -> Tensor:
        pixels = super().units(call)
        return pixels[(pixels != 0).flatten(1).any(1)]  # all-zero pictures are padding; the model skips them

    def joined_side(self, base: Any, config: Any) -> int:
        return int(config.scale_factor)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        return _idefics(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, "idefics3_vision")


@register_family("smolvlm")
class SmolVLM(Idefics):
    """SmolVLM: as Idefics3; video frames are pictures after "Frame from mm:ss:", told apart when ids can be decoded."""

    clips_in_one_tensor = True
    mixes_modalities = False
    times_frames = True

    frames_by_words = True

    def pictures(self, call: EncoderCall, runs: list[PlaceholderRun], n: int) -> Iterator[TiledPicture]:
        index = 0
        seconds: tuple[float, ...] = ()
        for picture in super().pictures(call, runs, n):
            text = "" if call.decode is None or picture.count > 1 else call.decode(list(runs[index].before))
            time = re.search(r"Frame from (\d+):(\d+):[^:]*$", text)
            index += picture.count
            # Between two frames of a video there is nothing but the closing tag and a line break.
            if seconds and not (time and re.match(r"\S+\nFrame from", text)):
                yield TiledPicture(len(seconds), video=True, seconds=seconds)
                seconds = ()
            if time:
                seconds += (60.0 * int(time.group(1)) + int(time.group(2)),)
            else:
                yield picture
        if seconds:
            yield TiledPicture(len(seconds), video=True, seconds=seconds)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        # Its own processor adds number words to video prompts only (a further package); images go through Idefics 3's.
        return _idefics(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, "smolvlm_vision")


def _idefics(config_class: Any, model_class: Any, vision: str) -> TinyParts:
    import transformers as hf

    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    text = tokenizer(marks, bos=True)
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        text,
        image_seq_len=16,
    )
    config = config_class(
        vision_config=tower(model_type=vision, image_size=32),
        text_config=language(),
        scale_factor=2,
        image_token_id=text.convert_tokens_to_ids("<image>"),
        pad_token_id=text.pad_token_id,
    )
    return tiny_parts(model_class(config), processor, "<image>")
