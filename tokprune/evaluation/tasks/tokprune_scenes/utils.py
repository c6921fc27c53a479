"""What tokprune_scenes.yaml names: picture, prompt and score of a row. lmms-eval executes this file once per name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokprune.evaluation.scoring import doc_to_text, macro, process_results
from tokprune.types import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["doc_to_text", "doc_to_visual", "macro", "process_results"]


def doc_to_visual(doc: JsonObject) -> list[Image]:
    """The picture of a row."""
    if doc["image"] is None:
        raise ValueError(f"question_id {doc['question_id']} has no image")
    return [doc["image"].convert("RGB")]
