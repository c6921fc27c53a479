"""The processor that belongs to a model's weights, where the user has given none."""

from __future__ import annotations

from typing import Any


def local_processor(model: Any) -> Any:
    """Processor, or else tokenizer, saved where a model was loaded from; None where it has none or nothing can be read.

    Nothing is downloaded: what the hub's cache or the model's folder holds is all that counts.
    """
    name = str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return None
    from transformers import AutoProcessor, AutoTokenizer

    for kind in (AutoProcessor, AutoTokenizer):
        try:
            processor = kind.from_pretrained(name, local_files_only=True)
        except (
            Exception
        ):  # missing, broken or remote code: then the user's own processor is needed, and the error asks for it
            continue
        if _knows_words(getattr(processor, "tokenizer", processor)):
            return processor
    return None


def _knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer tells words apart; transformers makes an empty one where a folder has a config alone."""
    try:
        ids = tokenizer("What is this?", add_special_tokens=False)["input_ids"]
    except Exception:  # whatever stands in a tokenizer's place
        return False
    return len(set(ids)) > 1
