"""Native-resolution towers: the Qwen-VL line, GLM-4V and VideoLLaMA 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tokprune.testing.parts import (
    MROPE,
    PIXELS,
    WIDTH,
    Parts,
    chat_template,
    hybrid_language,
    language,
    pixel_range,
    tokenizer,
    tower,
)

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _words() -> tuple[Any, dict[str, Any]]:
    text = tokenizer(list(NAMES.values()), named=NAMES)
    return text, {f"{name}_id": text.convert_tokens_to_ids(token) for name, token in NAMES.items()}


def _images() -> Any:
    return hf.Qwen2VLImageProcessor(size=pixel_range(16 * 16, 64 * 64), **PIXELS)


def _clips() -> Any:
    return hf.Qwen2VLVideoProcessor(
        size=pixel_range(16 * 16, 48 * 48), do_sample_frames=False, cap_pixels_per_frame=False, **PIXELS
    )


def _clips_in_frames() -> Any:  # from Qwen3-VL on the size counts all frames, and each frame is a run of its own
    return hf.Qwen3VLVideoProcessor(
        size=pixel_range(2 * 16 * 16, 4 * 48 * 48), do_sample_frames=False, cap_pixels_per_frame=False, **PIXELS
    )


def _tower(depth: int, **more: Any) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "num_heads": 4,
        "intermediate_size": 64,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **more,
    }


def qwen2_vl() -> Parts:
    """Qwen2-VL: 2 x 2 merge, multimodal rotary positions."""
    text, ids = _words()
    processor = hf.Qwen2VLProcessor(_images(), text, _clips(), chat_template=chat_template(IMAGE, VIDEO))
    config = hf.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=language("qwen2_vl_text", rope_parameters=dict(MROPE)),
        **ids,
    )
    return Parts(hf.Qwen2VLForConditionalGeneration(config), processor, IMAGE, VIDEO)


def qwen2_5_vl() -> Parts:
    """Qwen2.5-VL: window attention in the tower, features restored to raster order."""
    text, ids = _words()
    processor = hf.Qwen2_5_VLProcessor(_images(), text, _clips(), chat_template=chat_template(IMAGE, VIDEO))
    config = hf.Qwen2_5_VLConfig(
        vision_config=_tower(3, window_size=16, fullatt_block_indexes=[2]),
        text_config=language("qwen2_5_vl_text", rope_parameters=dict(MROPE)),
        **ids,
    )
    return Parts(hf.Qwen2_5_VLForConditionalGeneration(config), processor, IMAGE, VIDEO)


def qwen3_vl() -> Parts:
    """Qwen3-VL: DeepStack planes from two tower blocks, one run of tokens per frame."""
    text, ids = _words()
    processor = hf.Qwen3VLProcessor(
        _images(), text, _clips_in_frames(), chat_template=chat_template(IMAGE, "<|video_pad|>")
    )
    config = hf.Qwen3VLConfig(
        vision_config=_tower(4, num_position_embeddings=64, deepstack_visual_indexes=[1, 2]),
        text_config=language(
            "qwen3_vl_text", head_dim=16, num_hidden_layers=4, rope_parameters={**MROPE, "mrope_interleaved": True}
        ),
        **ids,
    )
    return Parts(hf.Qwen3VLForConditionalGeneration(config), processor, IMAGE, "<|video_pad|>")


def qwen3_5() -> Parts:
    """Qwen3.5: hybrid language model with linear-attention layers."""
    text, ids = _words()
    processor = hf.Qwen3VLProcessor(
        _images(), text, _clips_in_frames(), chat_template=chat_template(IMAGE, "<|video_pad|>")
    )
    config = hf.Qwen3_5Config(vision_config=_tower(2, num_position_embeddings=64), text_config=hybrid_language(), **ids)
    return Parts(hf.Qwen3_5ForConditionalGeneration(config), processor, IMAGE, "<|video_pad|>")


def glm4v() -> Parts:
    """GLM-4V: images and clips share one placeholder id; a prompt holds one or the other."""
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    video = "<|begin_of_video|><|video|><|end_of_video|>"
    names = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    text = tokenizer(list(names.values()), named={name: names[name] for name in ("image_token", "video_token")})
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size=pixel_range(2 * 16 * 16, 2 * 64 * 64), **PIXELS),
        text,
        hf.Glm4vVideoProcessor(size=pixel_range(16 * 16, 4 * 48 * 48), do_sample_frames=False, **PIXELS),
        chat_template=chat_template(image, video),
    )
    config = hf.Glm4vConfig(
        vision_config=_tower(2, image_size=32),
        text_config=language("glm4v_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        **{f"{name}_id": text.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return Parts(hf.Glm4vForConditionalGeneration(config), processor, image, video, mixes=False)


def video_llama_3() -> Parts:
    """VideoLLaMA 3: drops redundant patches of a clip by itself, before any pruning."""
    text = tokenizer(["<image>", "<video>"], named={"image_token": "<image>", "video_token": "<video>"})
    processor = hf.VideoLlama3Processor(
        hf.VideoLlama3ImageProcessor(size=pixel_range(16 * 16, 64 * 64), patch_size=4, merge_size=1),
        text,
        hf.VideoLlama3VideoProcessor(
            size=pixel_range(16 * 16, 48 * 48), patch_size=4, merge_size=2, do_sample_frames=False
        ),
        chat_template=chat_template("<image>", "<video>"),
    )
    config = hf.VideoLlama3Config(
        vision_config=tower(),
        text_config=language("qwen2"),
        image_token_id=text.convert_tokens_to_ids("<image>"),
        video_token_id=text.convert_tokens_to_ids("<video>"),
    )
    return Parts(hf.VideoLlama3ForConditionalGeneration(config), processor, "<image>", "<video>")


BUILDERS: dict[str, Callable[[], Parts]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "glm4v": glm4v,
    "video_llama_3": video_llama_3,
}
