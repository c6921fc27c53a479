"""Measures the demo VLM the way a user runs it: chat template, processor, `generate()`, compare the word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from PIL import Image

from .scenes import Example

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_ANSWER_TOKENS = 3  # one word, the end, and room to see that a model does not stop


def prompt(processor: LlavaProcessor, question: str, with_image: bool = True) -> str:
    """The question in the model's chat template, ready for the processor."""
    content = [{"type": "image"}] if with_image else []
    content.append({"type": "text", "text": question})
    conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[str],
    images: Sequence[Image.Image] | None = None,
) -> list[str]:
    """Generate the answers to one batch of questions, each about its image, or without any."""
    texts = [prompt(processor, question, images is not None) for question in questions]
    inputs = processor(text=texts, images=None if images is None else list(images), return_tensors="pt", padding=True)
    inputs = inputs.to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    generated = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)  # type: ignore[misc]
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def correct(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    image: Literal["own", "none", "wrong"] = "own",
    batch_size: int = 32,
) -> list[bool]:
    """Whether each example is answered right: with its own image, with none, or with the one of another scene."""
    if image not in ("own", "none", "wrong"):
        raise ValueError(f"image must be 'own', 'none' or 'wrong', got {image!r}")
    hits: list[bool] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        images: list[Image.Image] | None = None
        if image == "own":
            images = [example.image for example in batch]
        elif image == "wrong":
            images = [_other_image(examples, start + i) for i in range(len(batch))]
        said = answer(model, processor, [example.question for example in batch], images)
        hits.extend(word == example.answer for word, example in zip(said, batch, strict=True))
    return hits


class Typed(Protocol):
    """A question of some type, about a picture or a clip."""

    @property
    def type(self) -> str: ...


def accuracy(examples: Sequence[Typed], hits: Sequence[bool]) -> dict[str, float]:
    """Share of right answers by question type, their mean ("macro"), and over all questions ("micro")."""
    if not examples:
        raise ValueError("no examples to average over")
    by_type: defaultdict[str, list[bool]] = defaultdict(list)
    for example, hit in zip(examples, hits, strict=True):
        by_type[example.type].append(hit)
    shares = {kind: sum(values) / len(values) for kind, values in by_type.items()}
    return {**shares, "macro": sum(shares.values()) / len(shares), "micro": sum(hits) / len(examples)}


def _other_image(examples: Sequence[Example], index: int) -> Image.Image:
    """The image half a list away, or the next one after it that shows another scene."""
    for step in range(len(examples)):
        other = examples[(index + len(examples) // 2 + step) % len(examples)]
        if other.scene.seed != examples[index].scene.seed:
            return other.image
    raise ValueError("a wrong image needs examples of at least two scenes")
