"""What tokprune_clips.yaml names: file, prompt and score of a row. lmms-eval executes this file once per name."""

from __future__ import annotations

from pathlib import Path

from tokprune.evaluation.scoring import macro, score
from tokprune.types import JsonObject

__all__ = ["doc_to_text", "doc_to_visual", "macro", "process_results"]

CLIPS = Path(__file__).resolve().parent / "clips"


def doc_to_visual(doc: JsonObject) -> list[str]:
    """The mp4 file of a row."""
    if not doc["video"]:
        raise ValueError(f"question_id {doc['question_id']} has no video")
    return [str(CLIPS / doc["video"])]


def doc_to_text(doc: JsonObject, lmms_eval_specific_kwargs: JsonObject | None = None) -> str:
    """The question between what is said before and after every question."""
    words = lmms_eval_specific_kwargs or {}
    return f"{words.get('pre_prompt', '')}{doc['question']}{words.get('post_prompt', '')}"


def process_results(doc: JsonObject, results: list[str]) -> JsonObject:
    """1 or 0 for the whole and for the row's type."""
    return score(results[0], doc["answer"], doc["type"])
