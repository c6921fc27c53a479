"""How the installed transformers calls its KV cache, for tests; worked out without the code under test."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def with_cache(cache: Any) -> dict[str, Any]:
    """`cache` as a keyword argument of generate() and of forwards."""
    return {NAME: cache}


def cache_in(call: Any) -> Any:
    """The cache among a call's keyword arguments or in an output."""
    return call.get(NAME)
