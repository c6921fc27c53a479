"""Has the VLM name what a question is about, before its frames are scored by these things."""

from __future__ import annotations

from tokprune.adapters.base import Adapter
from tokprune.adapters.types import Processor
from tokprune.errors import MissingSignalError
from tokprune.runtime.frames.text_answer import text_answer

MOST_TOKENS = 128


def decoupled(adapter: Adapter, processor: Processor, question: str) -> tuple[tuple[str, ...], str]:
    """The entities that answer a question by being seen, and how they were found; none where the question itself
    serves.

    One greedy answer of at most 128 tokens, without pictures. What cannot be read as a list counts as none.
    """
    from tokprune.methods.frames.decouple import decoupling_prompt, parse_decoupling

    if processor is None:
        raise MissingSignalError(
            "decouple=True asks the model about the question and needs its processor for that: apply(..., "
            "processor=processor)."
        )
    said = text_answer(adapter, processor, decoupling_prompt(question), MOST_TOKENS)
    entities = tuple(parse_decoupling(said) or ())
    if entities:
        return entities, f"entities named by the model: {', '.join(entities)}"
    return (), "decoupling named no entities"
