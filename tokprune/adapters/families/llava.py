"""LLaVA-1.5 and VipLLaVA: one grid of CLIP patches per picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families.base import EncoderCall, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.tiny import TinyParts, clip_tower, language, square, tiny_parts, tokenizer
from tokprune.adapters.families.units import SizedImages, Units


@register_family("llava", "vipllava")
class Llava(Units):
    """LLaVA-1.5 and VipLLaVA: one grid per image; with the strategy "full" the [CLS] token stands before it."""

    tiny_types: tuple[str, ...] = ("llava", "vipllava")

    def patches(self, call: EncoderCall) -> int | None:
        return None if call.kwargs.get("image_sizes") is not None else super().patches(call)

    def cls_rows(self, call: EncoderCall) -> int:
        """Rows of special tokens before the grid of each image."""
        height, width = self.patch_grid(call)
        extra = super().tokens_per_unit(call) - height * width
        if extra not in (0, 1):
            raise UnknownGeometryError(f"{call.lengths[0]} tokens do not fit {height} x {width} patches")
        return extra

    def tokens_per_unit(self, call: EncoderCall) -> int:
        return super().tokens_per_unit(call) - self.cls_rows(call)

    def unit_count(self, call: EncoderCall) -> int:
        return len(call.lengths)

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        if call.kwargs.get("image_sizes") is not None:  # a Pixtral tower
            return SizedImages().streams(call)
        extra = self.cls_rows(call)
        streams = super().streams(call)
        if not extra:
            return streams
        # [CLS] is no candidate: like a newline it stays as long as a token of its line, here the image, does.
        lone = torch.zeros(1, dtype=torch.long)
        return [replace(s, rows=s.rows + 1, total=s.total + 1, separators=lone, separator_line=lone) for s in streams]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        if call.kwargs.get("image_sizes") is not None:
            return SizedImages().arrange(call, values, fill)
        extra = self.cls_rows(call)
        grid = super().arrange(call, values, fill)
        if not extra:
            return grid
        per_unit = grid.unflatten(0, (self.unit_count(call), -1))
        return F.pad(per_unit, (0, 0, extra, 0), value=fill).flatten(0, 1)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = words()
        processor, fields = hf.LlavaProcessor(cropped(hf.CLIPImageProcessor), text, **COUNTING), config_fields(text)
        if model_type == "llava":
            config = hf.LlavaConfig(**fields, vision_feature_layer=-2, vision_feature_select_strategy="default")
            return tiny_parts(hf.LlavaForConditionalGeneration(config), processor, "<image>")
        vip = hf.VipLlavaConfig(**fields, vision_feature_layer=[-2, -3, 1])  # the features of three blocks side by side
        return tiny_parts(hf.VipLlavaForConditionalGeneration(vip), processor, "<image>")


COUNTING: dict[str, Any] = {
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def words() -> Any:
    """The tokenizer of the whole kin."""
    return tokenizer(["<image>", "<video>"], bos=True, named={"image_token": "<image>", "video_token": "<video>"})


def cropped(kind: Any, **more: Any) -> Any:
    """A processor of `kind` that scales the short edge to 32 px and crops the middle."""
    return kind(size={"shortest_edge": 32}, crop_size=square(32), **more)


def config_fields(text: Any) -> dict[str, Any]:
    """What the configs of the kin share: a CLIP tower whose 64 patches are tokens. text: the tokenizer."""
    return {
        "vision_config": clip_tower(),
        "text_config": language(),
        "image_token_index": text.convert_tokens_to_ids("<image>"),
        "image_seq_length": 64,
    }
