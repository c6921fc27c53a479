"""What a question is about, as things one can see: the prompt that has a VLM name them, and how its answer is read."""

from __future__ import annotations

import ast
import json
import re
import warnings

LONGEST = 4096  # characters of an answer that are read
MOST, WIDEST = 16, 64  # things, and characters of each
NOTHING = frozenset(("", "none", "null", "nil", "n/a", "na", "nothing", "empty", "undefined"))
_LIST = re.compile(r"\[[^\[\]]*\]")  # flat lists only: nothing to nest, nothing to recurse into


def decoupling_prompt(question: str) -> str:
    """Ask a VLM which visible things a question about a video turns on. The answer is read by `parse_decoupling`."""
    return (
        f"Question about a video: {question.strip()}\n\n"
        "Do not answer it. To find the frames that matter, I will look for things in single frames.\n"
        "First decide whether the answer depends on particular things that a camera can see: people, animals, "
        "objects, places, text. "
        "If it does, name those things in a few words each, most important first, and leave out actions, numbers, "
        "opinions and the video itself.\n"
        'Reply with one line of JSON, a list of strings, and nothing else. For example ["red car", "traffic light"] '
        "for a question about what "
        "a red car does at the lights, and [] for a question about the mood of the film."
    )


def parse_decoupling(text: str) -> list[str] | None:
    """The things that a VLM named, or None where it named none: then the question itself is what to look for.

    text: the answer, whatever it is: JSON, a Python list, a list without quotation marks, prose around it, or nonsense.
    The last flat list in its first 4096 characters counts; at most 16 different names of at most 64 characters. Nothing
    is evaluated.
    """
    found = _LIST.findall(text[:LONGEST])
    if not found:
        return None
    names: list[str] = []
    for item in _items(found[-1]):
        name = " ".join(item.split())[:WIDEST].strip()
        if name.lower() not in NOTHING and any(c.isalnum() for c in name) and name not in names:
            names.append(name)
    return names[:MOST] or None


def _items(text: str) -> list[str]:
    """The strings of a flat list."""
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
    return [item.strip().strip("\"'`“”‘’").strip() for item in text[1:-1].split(",")]
