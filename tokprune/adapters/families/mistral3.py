"""Mistral 3 and LightOn OCR: a Pixtral tower, pictures in their own proportions."""

from __future__ import annotations

from tokprune.adapters.families.base import register_family
from tokprune.adapters.families.tiny import TinyParts, language, square, tiny_parts, tokenizer, tower
from tokprune.adapters.families.units import SizedImages


@register_family("mistral3", "lighton_ocr")
class Mistral3(SizedImages):
    """Pictures of any size, packed; blocks of patches merge to tokens."""

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos=True)
        processor = hf.PixtralProcessor(
            hf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size=square(4)),
            text,
            patch_size=4,
            spatial_merge_size=2,
        )
        config = hf.Mistral3Config(
            vision_config=tower(model_type="pixtral", head_dim=8, image_size=48),
            text_config=language("mistral", head_dim=16, sliding_window=None),
            spatial_merge_size=2,
            image_token_index=text.convert_tokens_to_ids("[IMG]"),
            tie_word_embeddings=False,
        )
        return tiny_parts(hf.Mistral3ForConditionalGeneration(config), processor, "[IMG]")
