"""The networks of the demo VLM: stock transformers classes, with starting values that let them train in minutes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, SHAPES, SIZE
from tools.demo.vocabulary import BOS, EOS, IMAGE, PAD, WORD_IDS, WORDS

from .recipe import Recipe

# Which neighbour (dx, dy) each head of the first layers looks at when training starts.
_FIRST_LOOKS = (
    ((1, 0), (-1, 0), (0, 1), (0, -1)),
    ((1, 1), (-1, 1), (1, -1), (-1, -1)),
    ((0, 0), (1, 0), (0, 1), (-1, -1)),
)


def vision_config(recipe: Recipe) -> CLIPVisionConfig:
    """The tower, which the VLM and the scorer share."""
    return CLIPVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=recipe.vision_mlp,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        image_size=SIZE,
        patch_size=recipe.patch,
        hidden_act="gelu",
        projection_dim=recipe.projection,
    )


def clip_config(recipe: Recipe) -> CLIPConfig:
    """The tower with a small text tower."""
    text = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=64,
        hidden_act="gelu",
        projection_dim=recipe.projection,
        pad_token_id=WORD_IDS[PAD],
        bos_token_id=WORD_IDS[BOS],
        eos_token_id=WORD_IDS[EOS],
    )
    vision = vision_config(recipe).to_dict()
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=recipe.projection)


def llava_config(recipe: Recipe) -> LlavaConfig:
    """LLaVA-1.5's arrangement: the tower's last layer but one without [CLS], a two-layer projector, a Llama."""
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=recipe.llm_width,
        intermediate_size=recipe.llm_mlp,
        num_hidden_layers=recipe.llm_layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=4096,
        pad_token_id=WORD_IDS[PAD],
        bos_token_id=WORD_IDS[BOS],
        eos_token_id=WORD_IDS[EOS],
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    return LlavaConfig(
        vision_config=vision_config(recipe).to_dict(),
        text_config=text.to_dict(),
        image_token_index=WORD_IDS[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(SIZE // recipe.patch) ** 2,
        tie_word_embeddings=True,
    )


def new_clip(recipe: Recipe) -> CLIPModel:
    """An untrained CLIP that computes attention the way that is fastest at this size."""
    clip = CLIPModel(clip_config(recipe))
    use_plain_attention(clip.vision_model)  # the text tower needs padding masks, which the stock kernels build
    return clip


def new_llava(recipe: Recipe) -> LlavaForConditionalGeneration:
    """An untrained LLaVA that computes attention the way that is fastest at this size."""
    llava = LlavaForConditionalGeneration(llava_config(recipe))
    use_plain_attention(llava)
    return llava


def use_plain_attention(model: PreTrainedModel) -> None:
    """Two matrix products and a softmax: at this size quicker than the fused kernels, forward and backward, on a
    CPU."""
    ALL_ATTENTION_FUNCTIONS.register("tokprune_plain", _plain_attention)
    model.set_attn_implementation("tokprune_plain")


def _plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    **_: object,
) -> tuple[Tensor, None]:
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))  # (B, H, Q, K)
    if attention_mask is not None:
        scores = scores + attention_mask
    mixed = torch.matmul(torch.softmax(scores, -1), value)
    return mixed.transpose(1, 2).contiguous(), None


class DenseHeads(nn.Module):
    """Linear read-outs of the patch features that the LLM will see: attributes, and where the object is.

    Without the two position heads the tower forgets where objects are, and the LLM could tell only from the order of
    its tokens, which pruning changes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.color = nn.Linear(width, 1 + len(COLOR_NAMES))
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.character = nn.Linear(width, 1 + len(CHARACTERS))
        self.position = nn.Linear(width, 2)
        self.quadrant = nn.Linear(width, 4)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(B, N, D) patch features to float32 logits and coordinates by name."""
        features = self.norm(features)
        heads = (self.color, self.shape, self.character, self.position, self.quadrant)
        names = ("color", "shape", "character", "position", "quadrant")
        return {name: head(features).float() for name, head in zip(names, heads, strict=True)}


@torch.no_grad()
def start_locally(tower: CLIPVisionModel, generator: torch.Generator, gain: float = 2.2) -> None:
    """Start positions as 2-D sines and cosines, and the first layers' heads looking at fixed neighbours.

    The rotation of a sinusoidal code by an offset is linear, so a query that is rotated against its key finds the patch
    at that offset. All weights stay trainable.
    """
    config: Any = tower.config
    embeddings: Any = tower.embeddings
    layers: Any = tower.encoder.layers
    width, side = config.hidden_size, config.image_size // config.patch_size
    count = width // 4  # frequencies; features are [sin x | cos x | sin y | cos y]
    frequencies = torch.linspace(0.08, 2.6, count)
    rows, columns = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    x, y = columns.flatten()[:, None] * frequencies, rows.flatten()[:, None] * frequencies
    embeddings.position_embedding.weight[1:] = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    embeddings.position_embedding.weight[0].normal_(0, 0.02, generator=generator)

    head_width = width // config.num_attention_heads
    used = torch.linspace(1, count - 1, head_width // 4).long().tolist()
    for layer, looks in zip(layers, _FIRST_LOOKS, strict=False):
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        query.normal_(0, 0.02, generator=generator)
        key.normal_(0, 0.02, generator=generator)
        for head in range(config.num_attention_heads):
            for axis, offset in enumerate(looks[head % len(looks)]):
                for place, index in enumerate(used):
                    row = head * head_width + 2 * (axis * len(used) + place)
                    sine, cosine = 2 * axis * count + index, (2 * axis + 1) * count + index
                    angle = float(frequencies[index]) * offset
                    query[row, sine] += gain * math.cos(angle)
                    query[row, cosine] += gain * math.sin(angle)
                    query[row + 1, cosine] += gain * math.cos(angle)
                    query[row + 1, sine] -= gain * math.sin(angle)
                    key[row, sine] += gain
                    key[row + 1, cosine] += gain


@torch.no_grad()
def start_whitened(tower: CLIPVisionModel, pixels: Tensor, generator: torch.Generator) -> None:
    """Start the patch embedding as a rotated PCA whitening of real patches; random filters see mostly brightness."""
    config: Any = tower.config
    patch, width = config.patch_size, config.hidden_size
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, columns, patch, patch)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * patch * patch)
    patches = patches[torch.randperm(len(patches), generator=generator)[:100_000]]
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    filters = (vectors / (values + 2e-3).sqrt()).T  # (D, 3 * patch * patch)
    rotation = torch.linalg.qr(torch.randn(len(filters), len(filters), generator=generator))[0]
    tower.embeddings.patch_embedding.weight.copy_((rotation @ filters).view(-1, 3, patch, patch))
