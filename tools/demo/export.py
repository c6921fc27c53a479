"""Stage "export": the trained parts as one LlavaForConditionalGeneration folder, with processor and scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tokprune.demo.scenes import SIZE
from tools.demo.vocabulary import ASSISTANT, BOS, EOS, IMAGE, PAD, UNKNOWN, USER, WORD_IDS

from .data import IMAGE_MEAN, IMAGE_STD
from .loop import load
from .networks import clip_config, llava_config
from .recipe import Recipe

_BEFORE_PARTS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + "{% else %}" + USER + "{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
)
_AFTER_PARTS = (
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} " + EOS + " {% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def chat_template(placeholders: Mapping[str, str]) -> str:
    """The template of a model that knows these kinds of parts, by what stands for each in the text."""
    parts = "".join(
        f"{{% {'elif' if place else 'if'} part['type'] == '{kind}' %}} {token}"
        for place, (kind, token) in enumerate(placeholders.items())
    )
    return _BEFORE_PARTS + parts + _AFTER_PARTS


CHAT_TEMPLATE = chat_template({"image": IMAGE})


def export(out: Path, recipe: Recipe, folder: Path) -> None:
    """Write everything that `from_pretrained` needs; weights in float16, which load as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tower, answerer = load(out / "clip.pt"), load(out / "qa.pt")
    llava = LlavaForConditionalGeneration(llava_config(recipe))
    llava.model.vision_tower.load_state_dict(part(tower, "clip.vision_model."))
    llava.model.multi_modal_projector.load_state_dict(part(answerer, "projector."))
    llava.model.language_model.load_state_dict(part(answerer, "llama."))
    llava.tie_weights()
    llava.generation_config = GenerationConfig(
        bos_token_id=WORD_IDS[BOS], eos_token_id=WORD_IDS[EOS], pad_token_id=WORD_IDS[PAD], do_sample=False
    )
    llava.half().save_pretrained(folder)
    claim_float32(folder / "config.json")
    build_processor(recipe).save_pretrained(folder)

    scorer = folder / "scorer"
    scorer.mkdir(exist_ok=True)
    clip_config(recipe).save_pretrained(scorer)
    prefix, unused = "clip.", ("vision_model.",)  # the vision tower is in the VLM's file
    rest = {k: v.half().contiguous() for k, v in part(tower, prefix).items() if not k.startswith(unused)}
    rest["logit_scale"] = tower["scales"][0].half()
    save_file(rest, scorer / "model.safetensors", metadata={"format": "pt"})


def build_tokenizer(ids: Mapping[str, int], placeholders: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, "?.," apart. placeholders: attribute to token, such as image_token."""
    special = (PAD, UNKNOWN, BOS, EOS, *placeholders.values())
    words = Tokenizer(models.WordLevel(dict(ids), unk_token=UNKNOWN))
    punctuation = [normalizers.Replace(mark, f" {mark} ") for mark in "?.,"]
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), *punctuation])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=dict(placeholders),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_processor(recipe: Recipe) -> LlavaProcessor:
    """Word-level tokenizer, CLIP image processor and chat template in one LlavaProcessor."""
    tokenizer = build_tokenizer(WORD_IDS, {"image_token": IMAGE})
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=recipe.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS], which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def claim_float32(path: Path) -> None:
    """Let `from_pretrained` load float32 by default, although the file is stored in half of that."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(config[key] for key in ("text_config", "vision_config"))):
        if "dtype" in part:
            part["dtype"] = str(torch.float32).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
