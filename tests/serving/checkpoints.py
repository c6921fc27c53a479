"""Tiny random checkpoints that vLLM loads, and the requests that both sides answer.

    python -m tests.serving.checkpoints FOLDER [FAMILY ...]

They are the tiny models of `tokprune.testing` with heads of 32, the smallest that vLLM's attention for CPUs takes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokprune.adapters.families import FAMILIES as REGISTERED
from tokprune.adapters.families.tiny import BOS, EOS, PAD
from tokprune.testing import Part, clip
from tokprune.testing.tiny import randomise

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
VIDEO = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")
WIDTH = 128  # four heads of 32
TOKENS = 16
SIZES = [(36, 30), (64, 40), (40, 64), (96, 96), (48, 96), (20, 28), (96, 32), (64, 64)]
QUESTIONS = ["What is on the picture?", "Which color is the circle?", "Count the stars.", "Left or right?"]


def widened(config: Any) -> Any:
    """The same config with heads of 32 in the language model and the tower."""
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim = WIDTH, 2 * WIDTH, 3, 32
    rope = getattr(text, "rope_parameters", None)
    if rope and "mrope_section" in rope:
        rope["mrope_section"] = [4, 6, 6]
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision.hidden_size, vision.intermediate_size = WIDTH, 2 * WIDTH
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = WIDTH
    if hasattr(vision, "tokens_per_second"):  # text behind a clip that is longer than it is wide: vLLM and transformers
        vision.tokens_per_second = 1  # 5.24 put it at different positions, with nothing pruned
    return config


def build(family: str, folder: Path) -> None:
    """Write the tiny model of a family with its processor."""
    torch.manual_seed(0)
    parts = REGISTERED[family].tiny(family)
    model = type(parts.model)(widened(parts.model.config))
    randomise(model, 0)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = PAD, BOS, EOS
    settings.do_sample = False
    model.save_pretrained(folder)
    images, clips = parts.processor.image_processor, getattr(parts.processor, "video_processor", None)
    if family == "qwen3_vl":  # vLLM normalises both alike, as the checkpoints of the hub do
        images.image_mean, images.image_std = clips.image_mean, clips.image_std
    parts.processor.save_pretrained(folder)
    if family.startswith("llava"):
        _as_on_the_hub(folder / "model.safetensors")


def _as_on_the_hub(file: Path) -> None:
    """transformers 5.24 writes `vision_tower.embeddings`; checkpoints of the hub, and vLLM, have `vision_model`
    between."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    renamed = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in weights.items()}
    save_file(weights if any(".vision_model." in k for k in weights) else renamed, file, metadata={"format": "pt"})


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture with coarse and fine structure, so that tokens differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-40, 41, (height, width, 3))).clip(0, 255).astype(np.uint8))


def requests(kind: str, family: str) -> list[list[Part]]:
    """32 questions about pictures of mixed sizes (or 5 about clips); the last ones repeat pictures and whole requests,
    and one has no picture. LLaVA-OneVision gets one picture a prompt: vLLM cuts several into tiles, transformers does
    not."""
    if kind == "video":
        clips = [clip(frames, 40, 32 + 16 * (frames % 3), seed=frames) for frames in (2, 4, 6, 8)]
        return [*([("video", c), QUESTIONS[i]] for i, c in enumerate(clips)), [("video", clips[1]), QUESTIONS[3]]]
    out: list[list[Part]] = []
    for i in range(24):
        count = 2 if i % 4 == 3 and family != "llava_onevision" else 1
        pictures = [("image", picture(*SIZES[(i + j) % len(SIZES)], seed=10 * i + j)) for j in range(count)]
        out.append([*pictures, QUESTIONS[i % len(QUESTIONS)]])
    again = [[*out[i][:-1], QUESTIONS[(i + 1) % 4]] for i in range(0, 8, 2)]  # the same picture, another question
    return [*out, *again, *out[:3], ["No picture at all?"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or ARCHITECTURES:
        build(name, Path(sys.argv[1]) / name)
