"""Measures the clip model the way a user runs it: mp4 file, decoder, chat template, processor, `generate()`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tokprune.video import read_video

from .clips import ClipExample

if TYPE_CHECKING:
    from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor

ANSWER_TOKENS = 3  # one word, the end, and room to see that a model does not stop


def clip_inputs(
    model: LlavaNextVideoForConditionalGeneration,
    processor: LlavaNextVideoProcessor,
    questions: Sequence[str],
    videos: Sequence[NDArray[np.uint8]] | None,
) -> Any:
    """Processor outputs of a batch of questions, each about its clip (T, H, W, 3), or without any."""
    texts = []
    for question in questions:
        content: list[dict[str, Any]] = [] if videos is None else [{"type": "video"}]
        content.append({"type": "text", "text": question})
        turn: list[dict[str, Any]] = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    options: dict[str, Any] = {} if videos is None else {"videos": list(videos), "do_sample_frames": False}
    return processor(text=texts, return_tensors="pt", padding=True, **options).to(model.device, model.dtype)


@torch.no_grad()
def generate_words(model: Any, processor: Any, inputs: Any) -> list[str]:
    """Greedy answers to prepared inputs."""
    generated = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    words = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in words]


def correct_clips(
    model: LlavaNextVideoForConditionalGeneration,
    processor: LlavaNextVideoProcessor,
    examples: Sequence[ClipExample],
    video: Literal["own", "none", "grey", "wrong"] = "own",
    batch_size: int = 8,
) -> list[bool]:
    """Whether each example is answered right: with its own clip, without any, with grey frames, or with another clip.

    Without any clip the prompt is of a kind that training never had, and the model may not even name a color; with grey frames
    it guesses.
    """
    if video not in ("own", "none", "grey", "wrong"):
        raise ValueError(f"video must be 'own', 'none', 'grey' or 'wrong', got {video!r}")
    frames = lru_cache(maxsize=64)(lambda path, count: read_video(path, frames=count).frames)
    hits: list[bool] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        shown = [_other(examples, start + i) for i in range(len(batch))] if video == "wrong" else batch
        clips = None if video == "none" else [frames(e.path, e.frames) for e in shown]
        if clips is not None and video == "grey":
            clips = [np.full_like(clip, 128) for clip in clips]
        inputs = clip_inputs(model, processor, [e.question for e in batch], clips)
        said = generate_words(model, processor, inputs)
        hits.extend(word == example.answer for word, example in zip(said, batch, strict=True))
    return hits


def chance(examples: Sequence[ClipExample]) -> dict[str, float]:
    """Share of the most frequent answer of each type: what a constant answer per type gets, and the mean ("macro")."""
    shares: dict[str, float] = {}
    for kind in dict.fromkeys(e.type for e in examples):
        answers = [e.answer for e in examples if e.type == kind]
        shares[kind] = max(map(answers.count, answers)) / len(answers)
    return {**shares, "macro": sum(shares.values()) / len(shares)}


def _other(examples: Sequence[ClipExample], index: int) -> ClipExample:
    """The example half a list away, or the next one after it about another clip."""
    for step in range(len(examples)):
        other = examples[(index + len(examples) // 2 + step) % len(examples)]
        if other.path != examples[index].path:
            return other
    raise ValueError("a wrong clip needs examples of at least two clips")
