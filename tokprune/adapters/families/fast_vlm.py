"""FastVLM: a convolutional tower, one grid per picture and no patches."""

from __future__ import annotations

from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, register_family
from tokprune.adapters.families.llava import words
from tokprune.adapters.families.tiny import TinyParts, language, square, tiny_parts
from tokprune.adapters.families.units import Fallback


@register_family("fast_vlm")
class FastVLM(Fallback):
    """FastVLM: a convolutional tower that gives one grid per picture and no patches."""

    tower_of_timm = True

    def patches(self, call: EncoderCall) -> int | None:
        return None

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        return Family.arrange(self, call, values, fill)

    def feature_layers(self, call: EncoderCall) -> list[int] | None:
        return None

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = words()
        processor = hf.LlavaProcessor(
            hf.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size=square(128)),
            text,
            patch_size=32,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
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
        return tiny_parts(hf.FastVlmForConditionalGeneration(config), processor, "<image>")
