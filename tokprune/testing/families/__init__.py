"""The families of tiny models: one module per kinship, each with a `BUILDERS` table from family name to builder."""

from __future__ import annotations

# Family -> module of this package that builds it. A table of strings: transformers is imported when one is built.
MODULES = {
    "llava": "llava",
    "vipllava": "llava",
    "llava_next": "llava",
    "llava_next_video": "llava",
    "llava_onevision": "llava",
    "qwen2_vl": "qwen",
    "qwen2_5_vl": "qwen",
    "qwen3_vl": "qwen",
    "qwen3_5": "qwen",
    "internvl": "tiled",
    "gemma3": "single",
    "paligemma": "single",
    "idefics3": "tiled",
    "smolvlm": "tiled",
    "mistral3": "single",
    "fast_vlm": "timm",
    "perception_lm": "timm",
    "ovis2": "tiled",
    "glm4v": "qwen",
    "video_llama_3": "qwen",
    "minicpmv4_6": "tiled",
    "molmo2": "tiled",
    "aya_vision": "tiled",
    "cohere2_vision": "tiled",
}
