"""The demo VLM's words: a closed vocabulary, so that every answer is one token."""

from __future__ import annotations

from collections.abc import Mapping

from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, QUADRANTS, SHAPES

PAD, UNKNOWN, BOS, EOS, IMAGE = "<pad>", "<unk>", "<s>", "</s>", "<image>"
USER, ASSISTANT = "user:", "assistant:"

# The last line holds words for several pictures in one prompt; the shipped weights have not been trained on them.
_LINES = (
    (PAD, UNKNOWN, BOS, EOS, IMAGE, USER, ASSISTANT, "?", ".", ",", "yes", "no"),
    COLOR_NAMES,
    SHAPES,
    tuple("0123456789"),
    tuple(character.lower() for character in CHARACTERS if not character.isdigit()),
    QUADRANTS,
    ("what", "color", "is", "the", "shape", "object", "objects", "shapes", "how", "many", "are", "there", "a"),
    ("where", "which", "character", "on", "with", "in", "at", "picture", "of", "an", "letter", "number"),
    ("first", "last", "frame", "frames", "then"),
)

WORDS: tuple[str, ...] = tuple(dict.fromkeys(word for line in _LINES for word in line))
WORD_IDS: dict[str, int] = {word: index for index, word in enumerate(WORDS)}

# The model for clips has the same words at the same numbers, and more after them.
VIDEO = "<video>"
CLIP_WORDS: tuple[str, ...] = (*WORDS, VIDEO, "after", "before", "scene", "scenes", "clip", "video", "next", "when")
CLIP_WORD_IDS: dict[str, int] = {word: index for index, word in enumerate(CLIP_WORDS)}


def encode(text: str, ids: Mapping[str, int] = WORD_IDS) -> list[int]:
    """Token ids of text that is already lower case with spaces between words (what the question generator writes)."""
    return [ids[word] for word in text.split()]
