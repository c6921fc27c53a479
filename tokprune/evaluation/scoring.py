"""What the offline tasks share: right or wrong for one-word answers, and the mean over question types."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from tokprune.types import Fields, JsonObject

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORD = re.compile(r"[a-z0-9]+")
# Words in front of the answer in "The answer is: red" or "It is a star".
_BEFORE = frozenset(
    {"the", "a", "an", "answer", "is", "it", "s", "are", "there", "its", "on", "of"}
    | {"color", "shape", "character", "letter", "number", "object"}
)
_SPELLED = {name: str(number) for number, name in enumerate(_NUMBERS)}
_SPELLED |= {"gray": "grey", "none": "0", "rhombus": "diamond", "plus": "cross"}


def _words(text: str) -> list[str]:
    return [_SPELLED.get(w, w) for w in _WORD.findall(text.lower())]


def right(said: str, expected: str) -> bool:
    """Whether the first words of an answer, after an opening such as "the answer is", are the expected ones.

    Case, punctuation, hyphens and spelled numbers do not matter: "Top left." is "top-left", "two" is "2".
    """
    wanted, words = _words(expected), _words(said)
    if words[: len(wanted)] == wanted and wanted:
        return True
    while len(words) > 1 and words[0] in _BEFORE:  # a last "a" is a letter that was read
        words = words[1:]
    return bool(wanted) and words[: len(wanted)] == wanted


def score(said: str, expected: str, kind: str) -> JsonObject:
    """The metrics of one row: accuracy, its share of the mean over types, and the row's own type."""
    hit = float(right(said, expected))
    return {"accuracy": hit, "macro": {"type": kind, "hit": hit}, kind: hit}


def macro(rows: Sequence[JsonObject]) -> float:
    """Mean over question types of the share answered right."""
    hits: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        hits[row["type"]].append(row["hit"])
    return sum(sum(h) / len(h) for h in hits.values()) / len(hits) if hits else 0.0


def doc_to_text(doc: Fields, lmms_eval_specific_kwargs: Fields | None = None) -> str:
    """The question of a row between what is said before and after every question."""
    words = lmms_eval_specific_kwargs or {}
    return f"{words.get('pre_prompt', '')}{doc['question']}{words.get('post_prompt', '')}"


def process_results(doc: Fields, results: Sequence[str]) -> JsonObject:
    """1 or 0 for the whole and for the row's type."""
    return score(results[0], doc["answer"], doc["type"])
