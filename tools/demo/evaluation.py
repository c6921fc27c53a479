"""Measures a demo VLM the way a user runs it: chat template, processor, `generate()`, compare the word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from tokprune.demo.asking import Asker, Medium, batch_size, shown, source
from tokprune.demo.clips import ClipExample
from tokprune.demo.scenes import Example
from tokprune.types import VLM, Processor

Seen = Literal["own", "none", "grey", "wrong"]
SEEN: tuple[Seen, ...] = ("own", "none", "grey", "wrong")
GREY = 128
AnyExample = TypeVar("AnyExample", Example, ClipExample)


def answer(
    model: VLM,
    processor: Processor,
    questions: Sequence[str],
    media: Sequence[Medium] | None = None,
) -> list[str]:
    """The answers to one batch of questions, each about its picture or clip (T, H, W, 3), or without any."""
    asker = Asker(model, processor)
    return asker.answers(asker.prepare(questions, media))


def correct(model: VLM, processor: Processor, examples: Sequence[AnyExample], seen: Seen = "own") -> list[bool]:
    """Whether each example is answered right: with its own picture or clip, without any, with grey, or with another
    one.

    Without any clip the prompt is of a kind that training never had, and the clip model may not even name a color; with
    grey frames it guesses.
    """
    if seen not in SEEN:
        raise ValueError(f"seen must be one of {', '.join(map(repr, SEEN))}, got {seen!r}")
    size = batch_size(examples)
    hits: list[bool] = []
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        if seen == "wrong":
            media: list[Medium] | None = [shown(_other(examples, start + i)) for i in range(len(batch))]
        else:
            media = None if seen == "none" else [shown(example) for example in batch]
        if media is not None and seen == "grey":
            media = [_grey(medium) for medium in media]
        said = answer(model, processor, [example.question for example in batch], media)
        hits.extend(word == example.answer for word, example in zip(said, batch, strict=True))
    return hits


def _grey(medium: Medium) -> Medium:
    if isinstance(medium, Image.Image):
        return Image.new("RGB", medium.size, (GREY, GREY, GREY))
    return np.full_like(medium, GREY)


def _other(examples: Sequence[AnyExample], index: int) -> AnyExample:
    """The example half a list away, or the next one after it about another picture or clip."""
    for step in range(len(examples)):
        other = examples[(index + len(examples) // 2 + step) % len(examples)]
        if source(other) != source(examples[index]):
            return other
    raise ValueError("a wrong picture needs examples of at least two scenes, a wrong clip of at least two clips")


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
