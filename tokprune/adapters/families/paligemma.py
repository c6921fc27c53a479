"""PaliGemma: one grid per picture, a bidirectional prompt, positions from 1."""

from __future__ import annotations

from typing import Any

from tokprune.adapters.families.base import register_family
from tokprune.adapters.families.tiny import WIDTH, TinyParts, language, siglip_tower, square, tiny_parts, tokenizer
from tokprune.adapters.families.units import Units


@register_family("paligemma")
class PaliGemma(Units):
    """One grid per picture; positions start at 1."""

    first_position = 1

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = tokenizer(["<image>"], named={"image_token": "<image>"})
        images: Any = hf.SiglipImageProcessor(size=square(32))
        images.image_seq_length = 64
        processor = hf.PaliGemmaProcessor(images, text)
        vocabulary = len(text)  # the processor has added its <loc> and <seg> tokens
        config = hf.PaliGemmaConfig(
            vision_config=siglip_tower(),
            projection_dim=WIDTH,
            hidden_size=WIDTH,
            vocab_size=vocabulary,
            image_token_index=text.convert_tokens_to_ids("<image>"),
            text_config=language("gemma", head_dim=16, vocab_size=vocabulary),
        )
        return tiny_parts(hf.PaliGemmaForConditionalGeneration(config), processor, "<image>")
