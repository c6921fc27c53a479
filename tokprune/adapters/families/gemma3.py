"""Gemma 3: 64 patches pooled to a grid of tokens that see each other both ways."""

from __future__ import annotations

from typing import Any

from tokprune.adapters.families.base import register_family
from tokprune.adapters.families.tiny import TinyParts, language, siglip_tower, square, tiny_parts, tokenizer
from tokprune.adapters.families.units import Units


@register_family("gemma3")
class Gemma3(Units):
    """One grid per picture (or crop), the mean of square blocks of SigLIP patches."""

    def joined_side(self, base: Any, config: Any) -> int:
        projector = getattr(base, "multi_modal_projector", None)
        return 1 if projector is None else int(projector.kernel_size)

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        text = tokenizer(list(names.values()), bos=True, named=names)
        processor = hf.Gemma3Processor(
            hf.Gemma3ImageProcessor(size=square(32)),
            text,
            image_seq_length=16,
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
        return tiny_parts(hf.Gemma3ForConditionalGeneration(config), processor, "<start_of_image>")
