"""The LLaVA kin: CLIP or SigLIP tower, MLP projector, 1-D rotary language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tokprune.testing.parts import Parts, chat_template, clip_tower, language, siglip_tower, square, tokenizer

# Canvases that LLaVA-NeXT may choose from, in pixels (height, width); a tile is 32 x 32.
CANVASES = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
# One [CLS] token, dropped by the "default" strategy: the processor counts 64 patches per tile.
COUNTING: dict[str, Any] = {
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def words() -> Any:
    """The tokenizer of the whole kin."""
    return tokenizer(["<image>", "<video>"], bos=True, named={"image_token": "<image>", "video_token": "<video>"})


def _cropped(kind: Any, **more: Any) -> Any:
    return kind(size={"shortest_edge": 32}, crop_size=square(32), **more)


def llava() -> Parts:
    """LLaVA-1.5: one 32 x 32 view, 64 tokens, second-to-last CLIP block."""
    text = words()
    processor = hf.LlavaProcessor(
        _cropped(hf.CLIPImageProcessor), text, chat_template=chat_template("<image>"), **COUNTING
    )
    config = hf.LlavaConfig(
        vision_config=clip_tower(),
        text_config=language(),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=64,
    )
    return Parts(hf.LlavaForConditionalGeneration(config), processor, "<image>")


def vipllava() -> Parts:
    """VipLLaVA: LLaVA with the features of three blocks side by side."""
    text = words()
    processor = hf.LlavaProcessor(
        _cropped(hf.CLIPImageProcessor), text, chat_template=chat_template("<image>"), **COUNTING
    )
    config = hf.VipLlavaConfig(
        vision_config=clip_tower(),
        text_config=language(),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -3, 1],
        image_seq_length=64,
    )
    return Parts(hf.VipLlavaForConditionalGeneration(config), processor, "<image>")


def llava_next() -> Parts:
    """LLaVA-NeXT: thumbnail and tiles, unpadded, a newline after every row."""
    text = words()
    processor = hf.LlavaNextProcessor(
        _cropped(hf.LlavaNextImageProcessor, image_grid_pinpoints=CANVASES),
        text,
        chat_template=chat_template("<image>"),
        **COUNTING,
    )
    config = hf.LlavaNextConfig(
        vision_config=clip_tower(),
        text_config=language(),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_grid_pinpoints=CANVASES,
        image_seq_length=64,
    )
    return Parts(hf.LlavaNextForConditionalGeneration(config), processor, "<image>")


def llava_next_video() -> Parts:
    """LLaVA-NeXT-Video: tiled images, and clips pooled to 16 tokens a frame."""
    text = words()
    processor = hf.LlavaNextVideoProcessor(
        _cropped(hf.LlavaNextVideoVideoProcessor, do_sample_frames=False),
        _cropped(hf.LlavaNextImageProcessor, image_grid_pinpoints=CANVASES),
        text,
        chat_template=chat_template("<image>", "<video>"),
        **COUNTING,
    )
    config = hf.LlavaNextVideoConfig(
        vision_config=clip_tower(),
        text_config=language(),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        video_token_index=text.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-2,
        image_grid_pinpoints=CANVASES,
        image_seq_length=64,
    )
    return Parts(hf.LlavaNextVideoForConditionalGeneration(config), processor, "<image>", "<video>")


def llava_onevision() -> Parts:
    """LLaVA-OneVision: SigLIP, tiles for single images, clips pooled to 16 tokens a frame and one newline."""
    text = words()
    canvases = [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=square(32), image_grid_pinpoints=canvases),
        text,
        hf.LlavaOnevisionVideoProcessor(size=square(32), do_sample_frames=False),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>", "<video>"),
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip_tower(),
        text_config=language("qwen2"),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        video_token_index=text.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=canvases,
    )
    return Parts(hf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>", "<video>")


BUILDERS: dict[str, Callable[[], Parts]] = {
    "llava": llava,
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
}
