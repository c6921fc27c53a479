"""The question of a benchmark row alone: what a query-aware method should look for in the picture."""

from __future__ import annotations

import re

from tokprune.types import Fields

QUESTION_FIELDS = ("question", "Question", "query", "problem")
_OPTION_LINE = re.compile(r"^\s*(?:options?\s*:?\s*$|\(?[A-Z][.):]\s)", re.IGNORECASE)
_FIRST_OPTION = re.compile(r"^\s*\(?A[.):]\s")


def question_of(doc: Fields, text: str) -> str:
    """The question of a row, without its options and the task's instructions.

    The row's own field when the prompt contains it, else the prompt up to the first option.
    """
    for name in QUESTION_FIELDS:
        value = doc.get(name)
        if isinstance(value, str) and value.strip() and _plain(value) in _plain(text):
            return _without_options(value)
    return _without_options(text)


def _without_options(text: str) -> str:
    lines = text.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if _FIRST_OPTION.match(line)), None)
    if first is not None:
        while first > 0 and _OPTION_LINE.match(lines[first - 1]):  # such as a heading "Options:"
            first -= 1
        kept = "\n".join(lines[:first]).strip()
        if kept:
            return kept
    return text.strip()


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
