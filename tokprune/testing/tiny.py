"""Tiny vision-language models with random weights and their real processors, built offline from configs."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokprune.adapters.base import TEXT_MODELS
from tokprune.adapters.families import FAMILIES as REGISTERED
from tokprune.adapters.families import tiny_families
from tokprune.adapters.families.tiny import BOS, BYTES, PAD, TinyParts
from tokprune.errors import OptionError, missing_extra, unknown
from tokprune.types import VLM, JsonObject, Processor

if TYPE_CHECKING:
    from transformers import BatchFeature

FAMILIES: tuple[str, ...] = tuple(tiny_families())

Part = str | tuple[str, Any]
"""A piece of a prompt: text, ("image", PIL image) or ("video", (T, H, W, 3) uint8 array)."""


@dataclass(frozen=True)
class Spec:
    """How prompts of a family are written.

    image, video: what stands for a picture or a clip in the prompt. mixes: both may stand in one batch.
    """

    image: str
    video: str | None = None
    mixes: bool = True

    @property
    def has_video(self) -> bool:
        """Whether the family takes clips."""
        return self.video is not None

    def mark(self, modality: str) -> str:
        """The prompt mark of "image" or "video", or the error that says which ones there are."""
        marks = {"image": self.image} | ({"video": self.video} if self.video is not None else {})
        if modality not in marks:
            raise unknown("modality of this family", modality, marks)
        return marks[modality]


@dataclass
class TinyVLM:
    """A tiny model of one family, its processor, and how to feed it."""

    family: str
    model: VLM
    processor: Processor
    spec: Spec

    def inputs(self, samples: Sequence[Sequence[Part]], padding_side: str = "left") -> BatchFeature:
        """What `model(**inputs)` takes for a batch of prompts, floats in the model's dtype.

        samples: one list of parts per row: "text", ("image", PIL image) or ("video", (T, H, W, 3) uint8 array).
        """
        texts = ["".join(p if isinstance(p, str) else self.spec.mark(p[0]) for p in parts) for parts in samples]
        return self._process(texts, samples, padding_side)

    def chat(self, samples: Sequence[Sequence[Part]], padding_side: str = "left") -> BatchFeature:
        """The same for one user turn per row, written by the processor's chat template and ready for the answer."""
        texts = [
            self.processor.apply_chat_template(self.messages(parts), add_generation_prompt=True, tokenize=False)
            for parts in samples
        ]
        return self._process(texts, samples, padding_side)

    def messages(self, parts: Sequence[Part]) -> list[JsonObject]:
        """One user turn in the message format of chat templates and pipelines."""
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], p[0]: p[1]} for p in parts]
        return [{"role": "user", "content": content}]

    def _process(self, texts: list[str], samples: Sequence[Sequence[Part]], padding_side: str) -> BatchFeature:
        if padding_side not in ("left", "right"):
            raise unknown("padding_side", padding_side, ("left", "right"))
        visual = [[part for part in parts if not isinstance(part, str)] for parts in samples]
        images = [[content for kind, content in row if kind == "image"] for row in visual]
        videos = [content for row in visual for kind, content in row if kind == "video"]
        if images and videos and any(images) and not self.spec.mixes:
            raise OptionError(f"{self.family} takes images or clips in one batch, not both; write them as two calls.")
        more: JsonObject = {}
        if any(images):
            more["images"] = images
        if videos:
            more["videos"] = videos
            more["video_metadata"] = [_metadata(frames) for frames in videos]
        features = self.processor(text=texts, return_tensors="pt", padding=True, padding_side=padding_side, **more)
        features.pop("labels", None)  # PaliGemma's processor adds training labels to plain prompts
        return features.to(device=self.model.device, dtype=self.model.dtype)


def build(
    family: str, *, seed: int = 0, attn: str = "sdpa", dtype: torch.dtype = torch.float32, layers: int | None = None
) -> TinyVLM:
    """Build a tiny model of `family` in eval mode with its processor; no download, the global random state stays as it
    is.

    seed: equal seeds give equal weights. attn: attention implementation of tower and language model ("sdpa", "eager").
    layers: of the language model, where its few are not enough.
    The weights are scaled so that every mistake shows in the logits. Generation is greedy, never ends early and only
    ever writes bytes: a placeholder id that a random model happens to emit would break the next turn.
    """
    if family not in tiny_families():
        raise unknown("family of tiny models", family, FAMILIES)
    _require("torchvision", "the image processors of transformers")
    known = REGISTERED[family]
    if known.tower_of_timm:
        _require("timm", f"the vision tower of {family}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: TinyParts = known.tiny(family)
    model = parts.model
    if layers is not None:
        _deepen(model, layers)
    randomise(model, seed)
    model.set_attn_implementation(attn)
    quiet_generation(model)
    model.to(dtype).eval()
    mixes = parts.video is None or known.mixes_modalities
    return TinyVLM(family, model, parts.processor, Spec(parts.image, parts.video, mixes))


def _metadata(frames: NDArray[np.uint8]) -> JsonObject:
    """What a video reader tells of a clip at two frames a second; some families write times into the prompt."""
    count, height, width = frames.shape[:3]
    return {
        "total_num_frames": count,
        "fps": 2.0,
        "duration": count / 2,
        "width": width,
        "height": height,
        "frames_indices": list(range(count)),
    }


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise missing_extra(package, "vision", purpose)


def _deepen(model: VLM, layers: int) -> None:
    """Repeat the language model's layers, of whatever kinds they are, until there are `layers`."""
    text = next(getattr(model.base_model, name) for name in TEXT_MODELS if hasattr(model.base_model, name))
    few, config = list(text.layers), text.config
    for i in range(len(few), layers):
        layer = copy.deepcopy(few[i % len(few)], {id(config): config})  # one config: the attention kernel stands there
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
        text.layers.append(layer)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % len(few)] for i in range(layers)]
    kinds = getattr(text, "rope_types", None)  # Molmo 2
    if kinds:
        text.rope_types = [kinds[i % len(few)] for i in range(layers)]
    config.num_hidden_layers = layers


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Redraw all matrices with unit gain; with the usual 0.02 logits of tiny models are near constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(max(weight[0].numel(), 1)))
        elif "class_embedding" in name or "newline" in name:  # vectors that stand for tokens
            weight.copy_(torch.randn(weight.shape, generator=generator))


def quiet_generation(model: VLM) -> None:
    """Greedy answers of the tiny model: its pad and start tokens, no end, and words of the byte vocabulary alone."""
    config = model.generation_config
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, BOS, None
    config.do_sample = False
    config.suppress_tokens = list(range(BYTES, model.config.get_text_config().vocab_size))
