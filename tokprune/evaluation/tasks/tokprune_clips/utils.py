"""What tokprune_clips.yaml names: file, prompt and score of a row. lmms-eval executes this file once per name."""

from __future__ import annotations

from pathlib import Path

from tokprune.evaluation.scoring import doc_to_text, macro, process_results
from tokprune.types import JsonObject

__all__ = ["doc_to_text", "doc_to_visual", "macro", "process_results"]

CLIPS = Path(__file__).resolve().parent / "clips"


def doc_to_visual(doc: JsonObject) -> list[str]:
    """The mp4 file of a row."""
    if not doc["video"]:
        raise ValueError(f"question_id {doc['question_id']} has no video")
    return [str(CLIPS / doc["video"])]
