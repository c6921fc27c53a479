"""The synthetic streams of `tokprune.testing`, under the name that the tests of methods use."""

from tokprune.testing.streams import (
    CLIP_WIDTH,
    ENCODER_WIDTH,
    HEAD_WIDTH,
    HEADS,
    LAYOUTS,
    WIDTH,
    changed,
    question,
    signals,
    stream,
)

__all__ = [
    "CLIP_WIDTH",
    "ENCODER_WIDTH",
    "HEADS",
    "HEAD_WIDTH",
    "LAYOUTS",
    "WIDTH",
    "changed",
    "question",
    "signals",
    "stream",
]
