"""The encoder outputs of tiny models and the streams that are made of them."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.adapters.probed import compute_signals, required_blocks
from tokprune.adapters.base import get_adapter
from tokprune.adapters.families import (
    EncoderCall,
    PlaceholderRun,
    StreamLayout,
    placeholder_runs,
    stream_layouts,
)
from tokprune.runtime.signals import SignalSet
from tokprune.testing import TinyVLM, build, clip, picture

Samples = list[list[Any]]


VIDEO = ("llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "glm4v")

VIDEO += ("perception_lm", "video_llama_3", "minicpmv4_6", "molmo2")


@functools.cache
def tiny(family: str) -> TinyVLM:
    return build(family)


@dataclass
class Encoded:
    """One encoder call of a tiny model and what the runtime would know about it."""

    vlm: TinyVLM
    modality: str
    kwargs: dict[str, Any]
    output: Any
    runs: list[PlaceholderRun]
    signals: SignalSet

    @property
    def base(self) -> Any:
        return self.vlm.model.base_model

    @property
    def features(self) -> Tensor:
        return torch.cat([f.reshape(-1, f.shape[-1]) for f in self.output.pooler_output])

    @property
    def call(self) -> EncoderCall:
        return EncoderCall(self.base, self.modality, self.kwargs, self.output)

    def layouts(self, **changes: Any) -> list[StreamLayout]:
        more = {"runs": self.runs, "decode": self.vlm.processor.tokenizer.decode} | changes
        return stream_layouts(self.base, self.modality, self.kwargs, self.output, **more)


@torch.no_grad()
def encode(vlm: TinyVLM, samples: Samples, needs: tuple[str, ...] = (), **options: Any) -> Encoded:
    """Run the encoder on a batch of prompts, as generate() does."""
    inputs, base, adapter = vlm.inputs(samples), vlm.model.base_model, get_adapter(vlm.model)
    modality = "video" if "pixel_values_videos" in inputs else "image"
    name, argument = adapter.family.encoder(adapter.base, modality) or ("", "")
    function = getattr(base, name)
    kwargs = {k: v for k, v in inputs.items() if k in inspect.signature(function).parameters}
    if argument:
        kwargs = {argument: inputs[{"image": "pixel_values", "video": "pixel_values_videos"}[modality]]}
    kwargs |= options
    probe = required_blocks(base, needs)
    output = function(**kwargs, return_dict=True)
    signals = compute_signals(base, modality, kwargs, output, probe, needs)
    probe.remove()
    columns = adapter.placeholders(inputs, {modality: output})[modality]
    return Encoded(vlm, modality, kwargs, output, placeholder_runs(inputs["input_ids"], columns), signals)


def prompts(pictures: list[Any], kind: str) -> Samples:
    """The first picture in a prompt of its own, the others together in a second."""
    parts = [(kind, p) for p in pictures]
    rows = [parts[:1], parts[1:]] if len(parts) > 1 else [parts]
    return [["look ", *(x for part in row for x in (part, " and ")), "what?"] for row in rows]


def media(family: str, kind: str) -> list[Any]:
    if kind == "video":
        return [clip(4, 48, 48, 1), clip(4, 48, 48, 2)]
    size = 3 if family == "minicpmv4_6" else 1  # its pictures are cut only when they are larger
    # LLaVA-OneVision pads pictures that share a prompt to squares: what is square has no padding to reckon with.
    last = (40, 40) if family == "llava_onevision" else (100 * size, 28 * size)
    return [picture(60 * size, 40 * size, 1), picture(40, 40, 2), picture(*last, 3)]
