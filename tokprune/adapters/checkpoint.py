"""What a checkpoint is, by its config alone: said before a processor or weights are read."""

from __future__ import annotations

from pathlib import Path

from tokprune.errors import OptionError


def check_vlm(name: str, source: str | Path | None = None, **common: object) -> None:
    """Raise OptionError where a model's config is one of a model that reads no pictures.

    name: what to call it, and where it is unless `source` says so. common: arguments of `from_pretrained`. A checkpoint
    whose config cannot be read, or which brings code of its own, is left to the loading itself.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as PICTURES

    try:
        config = AutoConfig.from_pretrained(source or name, **common)
    except (OSError, ValueError, ImportError):
        return
    if type(config) not in PICTURES and not getattr(config, "auto_map", None):
        raise OptionError(f"{name}: {no_vlm(config.model_type)}")


def no_vlm(kind: str) -> str:
    """The sentence about a model type that reads no pictures. kind: its `model_type`."""
    return f"{kind} is no vision-language model; give one that reads pictures, such as llava-hf/llava-1.5-7b-hf."


def refusal_of(error: BaseException) -> str:
    """What to say where transformers answers a text model with the list of all it knows; empty for other errors."""
    text = str(error)
    if "Unrecognized configuration class" not in text:
        return ""
    return no_vlm(text.partition("configuration_")[2].partition(".")[0] or "this")
