"""What is known of each model type of transformers: proven by the census of tests, refused and why, or not a VLM."""

from __future__ import annotations

from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """why: it cannot be pruned between encoder and LLM. instead: what to do."""

    why: str
    instead: str = "take a VLM whose picture tokens stand in the prompt (LLaVA, Qwen-VL, InternVL, Gemma and their kin)"


_QUERIES = Refusal("its Q-Former has reduced every picture to a few query tokens already")
_CROSS = Refusal("its visual tokens reach the LLM through cross-attention, not as placeholders in the prompt")
_ENCODER = Refusal("it is an encoder-decoder: its visual tokens go into the text encoder")
_CAPTION = Refusal("its text decoder reads the whole picture beside the text, without placeholders in a prompt")
_CODES = Refusal("its pictures are discrete codes of the vocabulary, of which the model may have to write more")
_PAGES = Refusal(
    "it returns a vector for every token of a page, with the mask of the whole prompt, so an index would hold the "
    "vectors of tokens that are not there",
    "prune its index instead, or reduce its vision tower: tokprune.apply(<its tower>, 'tome', r=8)",
)
_PARTS = Refusal(
    "its picture tokens are no placeholders of a prompt that its forward would read: it embeds them and calls the VLM "
    "inside by hand, and its action expert counts on every one",
    "run the VLM inside alone (model.model.vlm)",
)
_NO_DOOR = Refusal(
    "its forward encodes pictures by itself and takes no encoder outputs (mm_encoder_outputs), so that nothing can be "
    "dropped on the way"
)

REFUSED: dict[str, Refusal] = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _QUERIES),
    **dict.fromkeys(("mllama", "idefics"), _CROSS),
    **dict.fromkeys(("florence2", "t5gemma2", "udop", "pix2struct"), _ENCODER),
    **dict.fromkeys(("blip", "git", "vision-encoder-decoder", "pp_formulanet"), _CAPTION),
    **dict.fromkeys(
        ("kosmos-2", "kosmos-2.5"),
        Refusal("a perceiver has reduced every picture to a fixed number of latent tokens already"),
    ),
    **dict.fromkeys(("chameleon", "emu3", "glm_image", "apertus1p5"), _CODES),
    **dict.fromkeys(("colpali", "colqwen2", "colmodernvbert"), _PAGES),
    "pi0": _PARTS,
    "phi4_multimodal": _NO_DOOR,
    **dict.fromkeys(
        ("qwen2_5_omni", "qwen3_omni_moe"),
        Refusal(
            "it is a talker around a thinker, which sees the pictures",
            "apply to its thinker: tokprune.apply(model.thinker, ...); model.generate() runs it",
        ),
    ),
    "llama4": Refusal(
        "its forward fails in transformers 5.24 with or without tokprune (it asks its LLM for image_outputs), and its "
        "features are handed over before the projector"
    ),
    "granite4_vision": Refusal(
        "its picture tokens are planes that are added in several layers of the LLM (deepstack_features), without "
        "features at the placeholders to choose from"
    ),
    "diffusion_gemma": Refusal("it writes whole blocks by diffusion and has no prefill of placeholders"),
}
"""Model types with pictures that cannot be pruned between encoder and LLM."""

NOT_VISUAL = (
    *("evolla", "fun_asr_nano", "glmasr", "granite_speech", "granite_speech_plus", "kyutai_speech_to_text", "mistral4"),
    *("moss_transcribe_diarize", "nemo_speechlm", "omniasr", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral"),
    *("voxtral_realtime",),
)
"""Model types that transformers maps to multimodal models and that see no pictures: speech, proteins, text alone."""


# fmt: off
VERIFIED: tuple[str, ...] = (
    "aria", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl",
    "deepseek_vl_hybrid", "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "fuyu", "gemma3n", "gemma4",
    "gemma4_unified", "glm46v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga", "got_ocr2", "granite_docling",
    "hunyuan_vl", "hy_v4_vl", "hyperclovax_vision_v2", "idefics2", "inkling2", "inkling2_loop",
    "inkling_mm_model", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "minicpm_ocr", "minicpmv4_7",
    "minimax_m3_vl", "mistral_large4", "muse_glimmer", "muse_spark", "nemotron_h_omni", "paddleocr_vl",
    "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen3_5_moe", "qwen3_omni_moe_thinker",
    "qwen3_vl_moe", "qwen4_exp", "shieldgemma2", "step3p7", "unlimited_ocr", "video_llava",
)
# fmt: on
"""Model types beside the families that the census of tests proves equal to a brute-force reference."""


def refusal(config: Any) -> str | None:
    """Why models of a config cannot be pruned and what to do instead; None where nothing is known against it."""
    kind = str(getattr(config, "model_type", ""))
    if kind in NOT_VISUAL:
        return "it sees no pictures (speech, proteins or text alone), so there are no visual tokens to drop"
    known = REFUSED.get(kind)
    if known is None and hasattr(config, "vlm_config"):  # a model around a VLM that nobody has looked at
        known = Refusal("it wraps a VLM (config.vlm_config) and may embed pictures by itself", "apply to a VLM proper")
    return None if known is None else f"{known.why}. Instead: {known.instead}"
