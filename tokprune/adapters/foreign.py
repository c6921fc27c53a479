"""Everything that a pruning leaves on objects of others: names, where they are, what for, and when they go away.

Code takes the names from here, `tests/adapters/test_foreign.py` holds what it finds on models, caches, outputs and calls
against FOREIGN, and docs/architecture.md shows it as a table.
"""

from __future__ import annotations

from dataclasses import dataclass

HANDLE = "_tokprune"
CACHE_RECORD = "_tokprune"
CACHE_VIEW = "_tokprune_view"
UNFINISHED = "_tokprune_unfinished"
ENCODER_RECORD = "tokprune_record"
GENERATE_STEP = "tokprune_step"
PREPARE, PREFILL, CANDIDATES = "prepare_inputs_for_generation", "_prefill", "_get_candidate_generator"
ENCODERS = ("get_image_features", "get_video_features")


@dataclass(frozen=True)
class Foreign:
    """One thing on an object that is not ours. kind: attribute, method (one that answers instead of the object's own), hook,
    keyword (of a call) or class. name: of the attribute, method or keyword; empty for hooks and the class."""

    kind: str
    name: str
    on: str
    purpose: str
    until: str


REMOVED = "remove(), or apply() again"
FOREIGN: tuple[Foreign, ...] = (
    Foreign("attribute", HANDLE, "model", "the pruning that is on it", REMOVED),
    Foreign("method", PREPARE, "model", "generate(): what a step is given fits the keys that are kept", REMOVED),
    Foreign("method", PREFILL, "model", "generate(): a prompt that is read in chunks is shortened first", REMOVED),
    Foreign("method", CANDIDATES, "model", "cache stage: refuses assisted decoding", REMOVED),
    *(Foreign("method", name, "base model", "notes what is encoded, and its signals", REMOVED) for name in ENCODERS),
    Foreign("hook", "", "base model", "shortens the call before, widens the output behind", REMOVED),
    Foreign("hook", "", "language model", "checks that what it is given fits its cache", REMOVED),
    Foreign(
        "hook",
        "",
        "rotary embedding",
        "gives rotation the kept positions where attention gets contiguous ones",
        REMOVED,
    ),
    Foreign("hook", "", "attention layers of the LLM", "cache stage: chooses keys, and hides the others", REMOVED),
    Foreign("hook", "", "vision tower and its parts", "reads signals; encoder stage: shortens the sequence", REMOVED),
    Foreign(
        "method", "forward_intermediates", "vision tower (timm)", "encoder stage: feature maps at full length", REMOVED
    ),
    Foreign("method", "__prepare_scriptable__", "vision tower", "encoder stage: refuses torch.jit.script", REMOVED),
    Foreign(
        "method", "forward", "vision tower", "encoder stage: tells calls of this model from those of others", REMOVED
    ),
    Foreign("hook", "", "decoder layers", "widens hidden states on the way of their gradients", "the forward's end"),
    Foreign(
        "attribute", ENCODER_RECORD, "encoder output", "what was seen while it was encoded", "the output's own end"
    ),
    Foreign(
        "keyword", GENERATE_STEP, "call of the model", "what generate() knows of the step", "the base model's hook"
    ),
    Foreign(
        "attribute", CACHE_RECORD, "KV cache", "which prompt column each key is", "reset(), or the cache's own end"
    ),
    Foreign(
        "attribute", CACHE_VIEW, "KV cache", "whether it tells prompted or kept lengths", "the chunked prefill's end"
    ),
    Foreign("attribute", UNFINISHED, "KV cache", "a pruned prefill fills it and has not finished", "the prefill's end"),
    Foreign("class", "", "KV cache", "a subclass that knows both lengths", "reset(), or the cache's own end"),
)
