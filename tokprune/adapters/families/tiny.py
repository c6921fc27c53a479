"""Pieces that the tiny models share: a byte tokenizer, chat templates, and configs of small towers and language models.

Only plain dictionaries and the `tokenizers` package here; the family modules hand them to transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BYTES = 256  # ids 0..255 are the bytes; special tokens follow
PAD, BOS, EOS = 256, 257, 258
VOCAB = 384
WIDTH = 64  # hidden size of every tiny language model
CHAT = ("<|im_start|>", "<|im_end|>")  # what the chat template writes around a turn
PIXELS: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}  # of the Qwen-like processors

# Eight rotary frequencies (head size 16) shared by time, height and width.
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


class TinyParts(NamedTuple):
    """A model with its initial weights, its processor, and what stands for a picture or a clip in a prompt."""

    model: Any
    processor: Any
    image: str
    video: str | None = None


def tokenizer(special: Sequence[str], *, bos: bool = False, named: Mapping[str, str] | None = None) -> Any:
    """A byte-level tokenizer without merges: 256 bytes, <pad>, <s>, </s>, then the family's `special` tokens.

    bos: prompts start with <s>. named: attribute -> token, for processors that read `tokenizer.image_token` and the
    like.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", *special, *CHAT]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=100_000,
        extra_special_tokens=dict(named or {}),
    )


def chat_template(image: str, video: str = "") -> str:
    """A ChatML template in which pictures and clips appear as the family's marks."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'video' %}" + video + ""
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tiny_parts(model: Any, processor: Any, image: str, video: str | None = None) -> TinyParts:
    """The parts, with a chat template of the family's marks on the processor."""
    processor.chat_template = chat_template(image, video or "")
    return TinyParts(model, processor, image, video)


def language(model_type: str = "llama", **more: Any) -> dict[str, Any]:
    """Config of a two-layer language model; `more` adds to it or replaces some of it."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **more,
    }


def hybrid_language() -> dict[str, Any]:
    """Config of a Qwen3.5 language model: every second layer is a gated delta rule."""
    return language(
        "qwen3_5_text",
        head_dim=32,
        num_hidden_layers=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    )


def tower(**more: Any) -> dict[str, Any]:
    """Config of a two-block vision tower of width 32 with 4 x 4 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
        **more,
    }


def clip_tower() -> dict[str, Any]:
    """Config of a CLIP tower: 32 x 32 pixels, 64 patches and a [CLS] token."""
    return tower(model_type="clip_vision_model", num_hidden_layers=4, image_size=32, projection_dim=32)


def siglip_tower() -> dict[str, Any]:
    """Config of a SigLIP tower: 32 x 32 pixels, 64 patches, no [CLS] token."""
    return tower(model_type="siglip_vision_model", num_hidden_layers=3, image_size=32, vision_use_head=False)


def square(side: int) -> dict[str, int]:
    """`side` x `side` pixels, as image processors write it."""
    return {"height": side, "width": side}


def pixel_range(smallest: int, largest: int) -> dict[str, int]:
    """Pixel counts between which Qwen-like processors keep an image."""
    return {"shortest_edge": smallest, "longest_edge": largest}
