"""LLaVA-OneVision: tiles as LLaVA-NeXT, shrunk above a limit; video frames pooled, one newline at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families.base import EncoderCall, StreamLayout, register_family
from tokprune.adapters.families.geometry import frames
from tokprune.adapters.families.llava import words
from tokprune.adapters.families.llava_next import AnyRes
from tokprune.adapters.families.tiny import TinyParts, language, siglip_tower, square, tiny_parts


@register_family("llava_onevision")
class OneVision(AnyRes):
    """LLaVA-OneVision: images as LLaVA-NeXT, shrunk bilinearly above a limit; videos pooled, one newline at the end."""

    def video_streams(self, call: EncoderCall) -> list[StreamLayout]:
        count, length = self.video_shape(call)
        side = (self.side(call) + 1) // 2
        layout = frames(length, (side, side))
        n = length * side * side
        end, zero = torch.tensor([n]), torch.zeros(1, dtype=torch.long)
        one = StreamLayout(torch.arange(n), n + 1, layout, end, zero, torch.zeros(n, dtype=torch.long))
        return [one] * count

    def video_rows(self, call: EncoderCall, values: Tensor, fill: float) -> Tensor:
        base: Any = call.base
        count, _ = self.video_shape(call)
        rows = base.apply_pooling(values).reshape(count, -1, values.shape[-1])
        return F.pad(rows, (0, 0, 0, 1), value=fill).flatten(0, 1)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = words()
        canvases = [[32, 32], [32, 64], [64, 32], [64, 64]]
        processor = hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(size=square(32), image_grid_pinpoints=canvases),
            text,
            hf.LlavaOnevisionVideoProcessor(size=square(32), do_sample_frames=False),
            num_image_tokens=64,
            vision_feature_select_strategy="full",
        )
        config = hf.LlavaOnevisionConfig(
            vision_config=siglip_tower(),
            text_config=language("qwen2"),
            image_token_index=text.convert_tokens_to_ids("<image>"),
            video_token_index=text.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=canvases,
        )
        return tiny_parts(hf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>", "<video>")
