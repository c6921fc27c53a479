"""Images cut into tiles: InternVL, Idefics 3, SmolVLM, Ovis 2, MiniCPM-V, Molmo 2, Aya Vision, Command A Vision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tokprune.testing.parts import (
    VOCAB,
    WIDTH,
    Parts,
    chat_template,
    hybrid_language,
    language,
    siglip_tower,
    square,
    tokenizer,
    tower,
)

TILES: dict[str, Any] = {"size": square(32), "crop_to_patches": True, "min_patches": 1, "max_patches": 4}


def internvl() -> Parts:
    """InternVL: tiles with thumbnail, pixel shuffle to 16 tokens, frames as tiles."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    text = tokenizer(list(names.values()), named=names)
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(**TILES),
        text,
        hf.InternVLVideoProcessor(size=square(32), do_sample_frames=False),
        image_seq_length=16,
        chat_template=chat_template("<IMG_CONTEXT>", "<video>"),
    )
    config = hf.InternVLConfig(
        vision_config=tower(model_type="internvl_vision", num_hidden_layers=3, image_size=[32, 32], patch_size=[4, 4]),
        text_config=language("qwen2"),
        image_token_id=text.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    return Parts(hf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>", "<video>")


def _idefics(config_class: Any, model_class: Any, vision: str) -> Parts:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    text = tokenizer(marks, bos=True)
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        text,
        image_seq_len=16,
        chat_template=chat_template("<image>"),
    )
    config = config_class(
        vision_config=tower(model_type=vision, image_size=32),
        text_config=language(),
        scale_factor=2,
        image_token_id=text.convert_tokens_to_ids("<image>"),
        pad_token_id=text.pad_token_id,
    )
    return Parts(model_class(config), processor, "<image>")


def idefics3() -> Parts:
    """Idefics 3: tiles and thumbnail, pixel shuffle to 16 tokens each."""
    return _idefics(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, "idefics3_vision")


def smolvlm() -> Parts:
    """SmolVLM. Its own processor adds number words to video prompts only (a further package); images go through Idefics 3's."""
    return _idefics(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, "smolvlm_vision")


def ovis2() -> Parts:
    """Ovis 2: visual tokens are soft words of a visual vocabulary, framed by indicator tokens."""
    frame = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    text = tokenizer(["<image>", "<IMG_ATOM>", *frame])
    processor = hf.Ovis2Processor(
        hf.Ovis2ImageProcessor(size=square(32), crop_to_patches=True, max_patches=4),
        text,
        image_seq_length=16,
        chat_template=chat_template("<image>"),
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
    return Parts(hf.Ovis2ForConditionalGeneration(config), processor, "<image>")


def minicpmv4_6() -> Parts:
    """MiniCPM-V 4.6: slices, a merger inside the tower, hybrid language model; a prompt holds images or clips."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    text = tokenizer(list(names.values()), named=names)
    views: dict[str, Any] = {"scale_resolution": 64, "patch_size": 4}
    processor = hf.MiniCPMV4_6Processor(
        hf.MiniCPMV4_6ImageProcessor(max_slice_nums=4, **views),
        hf.MiniCPMV4_6VideoProcessor(max_slice_nums=1, do_sample_frames=False, **views),
        text,
        chat_template=chat_template("<|image_pad|>", "<|video_pad|>"),
    )
    config = hf.MiniCPMV4_6Config(
        vision_config=tower(num_hidden_layers=3, image_size=64),
        insert_layer_id=1,
        image_size=64,
        image_token_id=text.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=text.convert_tokens_to_ids("<|video_pad|>"),
        text_config=hybrid_language(),
    )
    model = hf.MiniCPMV4_6ForConditionalGeneration(config)
    return Parts(model, processor, "<|image_pad|>", "<|video_pad|>", mixes=False)


def molmo2() -> Parts:
    """Molmo 2: overlapping crops pooled by attention, added onto the placeholder embeddings; images or clips, one id for both."""
    ids = {
        "image_patch_id": "<im_patch>",
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    marks = {"image_token": "<|image|>", "video_token": "<|video|>"}
    text = tokenizer([*marks.values(), *ids.values(), "<im_col>", "<im_low>"], named=marks)
    views: dict[str, Any] = {"size": square(32), "patch_size": 4, "pooling_size": [2, 2]}
    processor = hf.Molmo2Processor(
        hf.Molmo2ImageProcessor(max_crops=4, overlap_margins=[1, 1], **views),
        hf.Molmo2VideoProcessor(do_sample_frames=False, **views),
        text,
        chat_template=chat_template("<|image|>", "<|video|>"),
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = hf.Molmo2Config(
        vision_config=tower(num_hidden_layers=3, image_size=[32, 32], **heads),
        adapter_config={
            "vision_feature_layer": [2, 1],
            "hidden_size": 32,
            "intermediate_size": 64,
            "text_hidden_size": WIDTH,
            **heads,
        },
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCAB,
            "additional_vocab_size": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        **{name: text.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    return Parts(hf.Molmo2ForConditionalGeneration(config), processor, "<|image|>", "<|video|>", mixes=False)


def _cohere_language() -> dict[str, Any]:
    return language("cohere2", head_dim=16, sliding_window=2048, layer_types=["sliding_attention", "full_attention"])


def aya_vision() -> Parts:
    """Aya Vision: tiles and thumbnail, 2 x 2 shuffle."""
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
        hf.GotOcr2ImageProcessor(**TILES),
        text,
        patch_size=4,
        img_size=32,
        downsample_factor=2,
        chat_template=chat_template("<image>"),
    )
    config = hf.AyaVisionConfig(
        vision_config=siglip_tower(),
        downsample_factor=2,
        image_token_index=text.convert_tokens_to_ids("<|IMG_PATCH|>"),
        text_config=_cohere_language(),
        tie_word_embeddings=True,
    )
    return Parts(hf.AyaVisionForConditionalGeneration(config), processor, "<image>")


def cohere2_vision() -> Parts:
    """Command A Vision: tiles and thumbnail, 2 x 2 shuffle, line breaks between tiles."""
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
        chat_template=chat_template("<|IMG_PATCH|>"),
    )
    config = hf.Cohere2VisionConfig(
        vision_config=siglip_tower(),
        downsample_factor=2,
        alignment_intermediate_size=128,
        image_token_id=text.convert_tokens_to_ids("<|IMG_PATCH|>"),
        text_config=_cohere_language(),
        tie_word_embeddings=True,
    )
    return Parts(hf.Cohere2VisionForConditionalGeneration(config), processor, "<|IMG_PATCH|>")


BUILDERS: dict[str, Callable[[], Parts]] = {
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "ovis2": ovis2,
    "minicpmv4_6": minicpmv4_6,
    "molmo2": molmo2,
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
}
