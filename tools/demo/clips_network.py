"""The clip model: LLaVA-NeXT-Video around the image model's tower, started from the image model's projector and
Llama."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlavaForConditionalGeneration, LlavaNextVideoConfig
from transformers import LlavaNextVideoForConditionalGeneration as ClipModel

from tokprune.demo.scenes import SIZE
from tools.demo.vocabulary import CLIP_WORD_IDS, CLIP_WORDS, IMAGE, VIDEO, WORDS

from .clips_data import POOL


def clip_model_config(image_model: LlavaForConditionalGeneration, new_layers: int) -> LlavaNextVideoConfig:
    """The image model's sizes with more words, more layers and 2 x 2 pooling."""
    config: Any = image_model.config
    text = {
        **config.text_config.to_dict(),
        "vocab_size": len(CLIP_WORDS),
        "num_hidden_layers": config.text_config.num_hidden_layers + new_layers,
    }
    vision = config.vision_config.to_dict()
    tokens = (SIZE // vision["patch_size"]) ** 2
    return LlavaNextVideoConfig(
        vision_config=vision,
        text_config=LlamaConfig.from_dict(text),
        image_token_index=CLIP_WORD_IDS[IMAGE],
        video_token_index=CLIP_WORD_IDS[VIDEO],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_grid_pinpoints=[[SIZE, SIZE]],
        spatial_pool_mode="average",
        spatial_pool_stride=POOL,
        image_seq_length=tokens,
        video_seq_length=tokens // POOL**2,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def start_from(image_model: LlavaForConditionalGeneration, new_layers: int, generator: torch.Generator) -> ClipModel:
    """A clip model that answers about one frame what the image model would.

    The new layers come first, where frames can be compared before words are looked up; they add nothing until trained.
    New words start as directions that no old word has.
    """
    model = ClipModel(clip_model_config(image_model, new_layers))
    source, target = image_model.model, model.model
    target.vision_tower.load_state_dict(source.vision_tower.state_dict())
    target.multi_modal_projector.load_state_dict(source.multi_modal_projector.state_dict())
    target.image_newline.zero_()
    llama, old = target.language_model, source.language_model
    llama.norm.load_state_dict(old.norm.state_dict())
    for layer, trained in zip(llama.layers[new_layers:], old.layers, strict=True):
        layer.load_state_dict(trained.state_dict())
    for layer in llama.layers[:new_layers]:
        for part in (layer.self_attn, layer.mlp):
            for matrix in (p for p in part.parameters() if p.ndim == 2):
                matrix.normal_(0, matrix.shape[1] ** -0.5, generator=generator)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    words, known = llama.embed_tokens.weight, old.embed_tokens.weight
    words[: len(WORDS)] = known
    fresh = torch.randn(len(CLIP_WORDS) - len(WORDS), words.shape[1], generator=generator)
    basis = torch.linalg.qr(known.T)[0]  # (D, V)
    fresh = torch.linalg.qr((fresh - fresh @ basis @ basis.T).T)[0].T
    words[len(WORDS) :] = fresh * known.norm(dim=-1).mean()
    model.tie_weights()
    return model
