"""What tiny models of single types need beside sizes that are shrunk by name: the data of `models`."""

from __future__ import annotations

from tokprune.types import JsonObject

MLA = {"num_key_value_heads": 4}  # multi-head latent attention: as many keys as heads
GEMMA = {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16}
SLIDING = ["sliding_attention", "full_attention"] * 2
INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 2048}

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GLM = {"text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}}
OMNI = {"vision_start_token_id": 301, "vision_end_token_id": 302}

CORRECTIONS: dict[str, dict[str, JsonObject]] = {
    "apertus1p5": {
        "": {"image_token_offset": 300, "audio_token_offset": 332},
        "text_config": {"vocab_size": 5000},
        "vision_config": {"codebook_size": 32, "base_channels": 32, "latent_channels": 32},
        "audio_config": {"hidden_size": 512, "num_filters": 32},
    },
    "cohere2_vision": {"": {"alignment_intermediate_size": 128}},
    "aria": {"": {"projector_patch_to_query_dict": {64: 16}}},
    "blip": {"text_config": {"encoder_hidden_size": 32}},
    "chameleon": {"": {"vocabulary_map": {"<image>": 260, "IMGIMGAZ": 261}}},
    "cohere_compass": {
        "text_config": {
            "layer_types": SLIDING,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING},
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_experts_per_tok": 2},
        "vision_config.sam_config": {"output_channels": 16, "downsample_channels": [16, 32], "window_size": 4},
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "global_head_dim": 32}
    },
    "dots3_note": {
        "text_config": MLA | {"head_dim": 32, "index_topk": 2048, "index_head_dim": 16, "index_n_heads": 2},
        "vision_config": {
            "moe_intermediate_size": 32,
            "num_local_experts": 4,
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense", "sparse"] * 2,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "emu3": {"": {"vocabulary_map": {"<image>": 260, "<|extra_200|>": 261}}},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    },
    "gemma3n": {
        "": {
            "vision_soft_tokens_per_image": 16,
            "vision_config": {
                "model_type": "gemma3n_vision",
                "architecture": "vit_pe_core_large_patch14_336",
                "hidden_size": 32,
                "vocab_size": 4,
                "vocab_offset": 380,
                "model_args": {
                    "embed_dim": 32,
                    "img_size": [56, 56],
                    "depth": 2,
                    "num_heads": 4,
                    "global_pool": "map",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [4, 4],
                    "class_token": False,
                },
            },
        },
        "text_config": GEMMA
        | {
            "intermediate_size": 128,
            "activation_sparsity_pattern": [0.0] * 4,
            "num_kv_shared_layers": 2,
            "layer_types": SLIDING,
            "laurel_rank": 8,
        },
    },
    "gemma4": {
        "": {
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            }
        },
        "text_config": GEMMA | {"global_head_dim": 32, "layer_types": SLIDING},
    },
    "gemma4_unified": {
        "": {
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "output_proj_dims": 32,
            }
        },
        "text_config": {"global_head_dim": 32, "layer_types": SLIDING},
    },
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), GLM),
    "glm4v_moe": {
        "text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
    },
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "fuyu": {"": {"patch_size": 4, "image_size": 32, "num_channels": 3}},
    "kimi_k25": {"text_config": MLA, "": {"projection_hidden_size": 32}},
    "gemma3": {"": {"mm_tokens_per_image": 16}},
    "shieldgemma2": {"": {"mm_tokens_per_image": 16}},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128}},
    "mistral_large4": {"text_config": MLA},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "step3p7": {"text_config": {"sliding_window": 2048}},
    "unlimited_ocr": {
        "vision_config.sam_config": {"output_channels": 16, "downsample_channels": [16, 32], "window_size": 4}
    },
    "glm5_next": {
        "text_config": MLA
        | {
            "qk_rope_head_dim": 0,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "head_dim": 0,
            "index_head_dim": 16,
            "index_n_heads": 2,
        }
    },
    "granite4_vision": {
        "": {
            "deepstack_layer_map": [[1, 0], [2, 1]],
            "spatial_target_layers": [0, 1, 2, 3],
            "downsample_rate": "1/2",
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        },
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
        }
    },
    "inkling2": {"text_config": INKLING},
    "inkling2_loop": {
        "text_config": INKLING
        | {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3}
    },
    "inkling_mm_model": {"text_config": INKLING, "vision_config": {"n_layers": 2}},
    "janus": {"vision_config": {"projection_dim": 64, "mlp_ratio": 2.0}},
    "kyutai_speech_to_text": {"codec_config": {"hidden_size": 512}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    **{
        name: {"": {"insert_layer_id": 1}, "vision_config": {"insert_layer_id": 1}}
        for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
    },
    "muse_glimmer": {"": {"out_hidden_size": 128, "projector_hidden_size": 64}},
    "muse_spark": {
        "": {"out_hidden_size": 128, "projector_hidden_size": 64},
        "text_config": {"moe_hidden_size": 32},
        "audio_config": {"hidden_sizes": (16, 16, 16, 16), "depths": (1, 1, 1, 1)},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1], "text_hidden_size": 64}},
    "nemotron_h_omni": {
        "": {"vision_hidden_size": 32, "projector_hidden_size": 64},
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64},
        "text_config": {
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 32,
        },
    },
    "qwen3_omni_moe_thinker": {"": OMNI, "text_config": {"rope_parameters": MROPE}},
    "qwen2_5_omni_thinker": {
        "": OMNI,
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    },
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"hidden_size": 64}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    },
    "qwen4_exp": {
        "text_config": {
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 4,
        },
    },
}
"""By model type and part of the config ("" for the whole), fields that are set."""
