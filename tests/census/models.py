"""A tiny random-weight model of any model type that transformers maps to image-text-to-text or multimodal models, made
from its config class alone: `tiny_model("kimi_k25")`.

Sizes are shrunk by the names of config fields, so that types that nobody has tried are built, too; what a type needs
beside that stands in `model_types`.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from tests.census.model_types import CORRECTIONS
from tokprune.adapters.families.tiny import BOS, EOS, PAD, VOCAB, WIDTH
from tokprune.errors import unknown
from tokprune.testing.tiny import quiet_generation, randomise
from tokprune.types import VLM, JsonObject

TEXT: JsonObject = {
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "sliding_window": 2048,
}
"""Sizes of a language model, by field."""

VISION: JsonObject = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "out_hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "depth": 4,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "num_patches": 64,
    "deepstack_visual_indexes": [0, 1, 2],
    "text_hidden_size": WIDTH,
    "vision_use_head": False,
    "mlp_dim": 64,
    "vision_output_dim": 32,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "output_dim": WIDTH,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "merge_size": 2,
    "projection_intermediate_size": 64,
}
"""Sizes of every other part."""


def tiny_config(model_type: str) -> Any:
    """The config of `model_type` with every part shrunk."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise unknown("model type", model_type, CONFIG_MAPPING)
    return _shrunk(CONFIG_MAPPING[model_type](), "", CORRECTIONS.get(model_type, {}))


def tiny_model(model_type: str, *, seed: int = 0) -> VLM:
    """A tiny model of `model_type` in eval mode, as the tiny families have them: weights that show every mistake,
    greedy generation of bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_type)(tiny_config(model_type))
    randomise(model, seed)
    if model.can_generate():
        quiet_generation(model)
    return model.to(torch.float32).eval()


def model_types() -> list[str]:
    """Every model type that the installed transformers maps to an image-text-to-text or multimodal model."""
    from transformers.models.auto import modeling_auto as auto

    return sorted({*auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def model_class(model_type: str) -> Any:
    """The class of models of a type of `model_types()`."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = {**auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return getattr(transformers, names[model_type])


def _shrunk(config: Any, path: str, corrections: dict[str, JsonObject]) -> Any:
    """A config with its sizes and those of its parts replaced. path: of the part, dotted; "" for the whole."""
    from transformers import PretrainedConfig

    parts = {
        name: _shrunk(part, f"{path}.{name}".lstrip("."), corrections)
        for name, part in vars(config).items()
        if isinstance(part, PretrainedConfig)
    }
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    name = path.rpartition(".")[2]
    text = not path or "text" in name or ("vocab_size" in fields and not re.search("vision|audio|encoder", path))
    new: JsonObject = {}
    for field, size in (TEXT if text else VISION).items():
        if fields.get(field) is not None:
            many = isinstance(fields[field], list | tuple) and isinstance(size, int)
            new[field] = [size] * len(fields[field]) if many else size
    if not path:
        ids = [
            f
            for f in fields
            if re.search(r"(image|video|audio|vision|bo[ai]|eo[aiv]|slice|newline|im_).*_(id|index)$", f)
        ]
        new |= {field: EOS + 1 + i for i, field in enumerate(ids)}
    rope = fields.get("rope_parameters") or {}
    if "mrope_section" in rope:
        half = int((new.get("qk_rope_head_dim") or new["head_dim"]) * rope.get("partial_rotary_factor", 1)) // 2
        new["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]}
    return type(config)(**{**parts, **new, **corrections.get(path, {})})
