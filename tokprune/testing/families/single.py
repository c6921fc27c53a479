"""One view per image: Gemma 3 and PaliGemma (bidirectional image blocks) and Mistral 3 (native aspect ratio)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tokprune.testing.parts import WIDTH, Parts, chat_template, language, siglip_tower, square, tokenizer, tower


def gemma3() -> Parts:
    """Gemma 3: 64 patches pooled to 16 tokens that see each other both ways."""
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    text = tokenizer(list(names.values()), bos=True, named=names)
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=square(32)),
        text,
        image_seq_length=16,
        chat_template=chat_template("<start_of_image>"),
    )
    config = hf.Gemma3Config(
        vision_config=siglip_tower(),
        mm_tokens_per_image=16,
        **{f"{name}_index": text.convert_tokens_to_ids(token) for name, token in names.items()},
        text_config=language(
            "gemma3_text",
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=2048,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    )
    return Parts(hf.Gemma3ForConditionalGeneration(config), processor, "<start_of_image>")


def paligemma() -> Parts:
    """PaliGemma: the whole prompt is bidirectional, positions count from 1."""
    text = tokenizer(["<image>"], named={"image_token": "<image>"})
    images: Any = hf.SiglipImageProcessor(size=square(32))
    images.image_seq_length = 64
    processor = hf.PaliGemmaProcessor(images, text, chat_template=chat_template("<image>"))
    vocabulary = len(text)  # the processor has added its <loc> and <seg> tokens
    config = hf.PaliGemmaConfig(
        vision_config=siglip_tower(),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=vocabulary,
        image_token_index=text.convert_tokens_to_ids("<image>"),
        text_config=language("gemma", head_dim=16, vocab_size=vocabulary),
    )
    return Parts(hf.PaliGemmaForConditionalGeneration(config), processor, "<image>")


def mistral3() -> Parts:
    """Mistral 3: Pixtral tower, 2 x 2 merge, break tokens between rows in the prompt."""
    text = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos=True)
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size=square(4)),
        text,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]"),
    )
    config = hf.Mistral3Config(
        vision_config=tower(model_type="pixtral", head_dim=8, image_size=48),
        text_config=language("mistral", head_dim=16, sliding_window=None),
        spatial_merge_size=2,
        image_token_index=text.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    return Parts(hf.Mistral3ForConditionalGeneration(config), processor, "[IMG]")


BUILDERS: dict[str, Callable[[], Parts]] = {"gemma3": gemma3, "paligemma": paligemma, "mistral3": mistral3}
