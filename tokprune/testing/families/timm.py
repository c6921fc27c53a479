"""Towers that come from timm: FastVLM and Perception LM."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from tokprune.testing.families.llava import words
from tokprune.testing.parts import Parts, chat_template, language, square, tokenizer


def fast_vlm() -> Parts:
    """FastVLM: a convolutional FastViT tower, 128 x 128 pixels to 16 tokens."""
    text = words()
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size=square(128)),
        text,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat_template("<image>"),
    )
    config = hf.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_t8",
            "do_pooling": True,
            "hidden_size": 768,
            "model_args": {"inference_mode": True},
        },
        text_config=language("qwen2"),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return Parts(hf.FastVlmForConditionalGeneration(config), processor, "<image>")


def perception_lm() -> Parts:
    """Perception LM: a Perception Encoder with [CLS], tiles pooled 2 x 2; a prompt holds images or clips."""
    marks = {"image_token": "<|image|>", "video_token": "<|video|>"}
    text = tokenizer(list(marks.values()), bos=True, named=marks)
    processor = hf.PerceptionLMProcessor(
        hf.PerceptionLMVideoProcessor(size=square(56), do_sample_frames=False),
        hf.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4),
        text,
        patch_size=14,
        pooling_ratio=2,
        chat_template=chat_template("<|image|>", "<|video|>"),
    )
    config = hf.PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "do_pooling": True,
            "model_args": {
                "embed_dim": 32,
                "img_size": [56, 56],
                "depth": 2,
                "num_heads": 4,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [4, 4],
            },
        },
        text_config=language(),
        projector_pooling_ratio=2,
        vision_use_cls_token=True,
        image_token_id=text.convert_tokens_to_ids("<|image|>"),
        video_token_id=text.convert_tokens_to_ids("<|video|>"),
    )
    return Parts(hf.PerceptionLMForConditionalGeneration(config), processor, "<|image|>", "<|video|>", mixes=False)


BUILDERS: dict[str, Callable[[], Parts]] = {"fast_vlm": fast_vlm, "perception_lm": perception_lm}
