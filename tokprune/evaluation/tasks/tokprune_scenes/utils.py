"""What tokprune_scenes.yaml names: picture, prompt and score of a row. lmms-eval executes this file once per name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokprune.evaluation.scoring import macro, score
from tokprune.types import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["doc_to_text", "doc_to_visual", "macro", "process_results"]


def doc_to_visual(doc: JsonObject) -> list[Image]:
    """The picture of a row."""
    if doc["image"] is None:
        raise ValueError(f"question_id {doc['question_id']} has no image")
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: JsonObject, lmms_eval_specific_kwargs: JsonObject | None = None) -> str:
    """The question between what is said before and after every question."""
    words = lmms_eval_specific_kwargs or {}
    return f"{words.get('pre_prompt', '')}{doc['question']}{words.get('post_prompt', '')}"


def process_results(doc: JsonObject, results: list[str]) -> JsonObject:
    """1 or 0 for the whole and for the row's type."""
    return score(results[0], doc["answer"], doc["type"])
