"""GLM-4V: packed patches as Qwen-VL; pictures and clips share one placeholder id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.families.base import register_family
from tokprune.adapters.families.qwen_vl import Packed, packed_tower
from tokprune.adapters.families.tiny import MROPE, PIXELS, TinyParts, language, pixel_range, tiny_parts, tokenizer


@register_family("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "glm5_next")
class Glm4v(Packed):
    """One placeholder id for pictures and clips; the type ids tell them apart, or the marks around clips."""

    mixes_modalities = False

    def placeholders(self, config: Any, call: Mapping[str, Any], columns: dict[str, Tensor]) -> dict[str, Tensor]:
        types, ids = call.get("mm_token_type_ids"), call.get("input_ids")  # (B, L) each
        both = columns["image"] if "image" in columns else columns["video"]
        marks = [getattr(config, f"video_{mark}_token_id", None) for mark in ("start", "end")]
        if types is None:
            if ids is None or None in marks:
                return columns
            start, end = (ids.eq(mark).cumsum(1) for mark in marks)
            inside = start > end
            return {"image": both & ~inside, "video": both & inside}
        length = both.shape[1]
        missing = length - types.shape[1]
        types = nn.functional.pad(types, (0, missing)) if missing > 0 else types[:, -length:]
        return {"image": both & (types != 2), "video": both & (types == 2)}

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

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
        )
        config = hf.Glm4vConfig(
            vision_config=packed_tower(2, image_size=32),
            text_config=language("glm4v_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
            **{f"{name}_id": text.convert_tokens_to_ids(token) for name, token in names.items()},
        )
        return tiny_parts(hf.Glm4vForConditionalGeneration(config), processor, image, video)
