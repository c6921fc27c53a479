"""Everything that a pruning leaves on objects of others: names, where they are, what for, and when they go away.

Code takes the names from here; `tests/adapters/test_foreign.py` holds what it finds on models, caches, outputs and
calls against FOREIGN, and docs/architecture.md shows it as a table.
"""

from __future__ import annotations

from dataclasses import dataclass

HANDLE = "_tokprune"
CACHE_RECORD = "_tokprune"
CACHE_VIEW = "_tokprune_view"
KEYS, VALUES = "keys", "values"
UNFINISHED = "_tokprune_unfinished"
ENCODER_RECORD = "tokprune_record"
GENERATE_STEP = "tokprune_step"
PREPARE, PREFILL, CANDIDATES = "prepare_inputs_for_generation", "_prefill", "_get_candidate_generator"
ENCODE_FIRST = "_maybe_prepare_encoder_kwargs_for_generation"
ENCODERS = ("get_image_features", "get_video_features")
FORWARD = "forward"
OWNER_CALLS = (FORWARD, "forward_intermediates", *ENCODERS, "encode_image")


@dataclass(frozen=True)
class Foreign:
    """One thing on an object that is not ours."""

    kind: str
    """attribute, method (one that answers for the object's own), hook, keyword (of a call) or class."""
    name: str
    """Of the attribute, method or keyword; empty for hooks and the class."""
    on: str
    purpose: str
    until: str
    """When it goes away."""


def _removed(kind: str, name: str, on: str, purpose: str) -> Foreign:
    return Foreign(kind, name, on, purpose, "remove(), or apply() again")


FOREIGN: tuple[Foreign, ...] = (
    _removed("attribute", HANDLE, "model", "the pruning that is on it"),
    _removed("method", PREPARE, "model", "a step of generate() fits the keys that are kept"),
    _removed("method", PREFILL, "model", "a prompt that is read in chunks is shortened first"),
    _removed("method", ENCODE_FIRST, "model", "what generate() encodes is read by its prefill"),
    _removed("method", CANDIDATES, "model", "decoder and cache stage: refuses assisted decoding"),
    *(_removed("method", name, "base model", "notes what is encoded, and its signals") for name in ENCODERS),
    _removed("hook", "", "base model", "shortens the call before, widens the output behind"),
    _removed("hook", "", "language model", "checks that what it is given fits its cache"),
    _removed("hook", "", "rotary embedding", "rotates by kept positions where attention gets contiguous ones"),
    _removed("hook", "", "language model", "decoder stage: knows where a forward begins and ends"),
    _removed("method", FORWARD, "decoder layers and their MLPs", "decoder stage: drops tokens in front of layers"),
    _removed("hook", "", "attention of the LLM", "cache stage: chooses keys, and hides the others"),
    _removed("hook", "", "vision tower and its parts", "reads signals; encoder stage: shortens the sequence"),
    *(_removed("method", name, "owner of the tower", "encoder stage: knows its own calls") for name in OWNER_CALLS),
    _removed("method", "forward_intermediates", "vision tower of timm", "encoder stage: feature maps at full length"),
    _removed("method", "__prepare_scriptable__", "vision tower", "encoder stage: refuses torch.jit.script"),
    Foreign("hook", "", "decoder layers", "widens hidden states on the way of their gradients", "the forward's end"),
    Foreign("hook", "", "decoder layers", "takes what a layer is given; a first pass ends there", "that pass's end"),
    Foreign("hook", "", "attention of the LLM", "makes the rows of a heat map", "the end of its with block"),
    Foreign("attribute", ENCODER_RECORD, "encoder output", "what was seen while encoding", "the output's own end"),
    Foreign(
        "keyword", GENERATE_STEP, "call of the model", "what generate() knows of the step", "the base model's hook"
    ),
    Foreign("attribute", CACHE_RECORD, "KV cache", "which prompt column each key is", "reset(), or the cache's end"),
    Foreign("attribute", CACHE_VIEW, "KV cache", "whether it tells kept lengths", "reset(), or the cache's end"),
    Foreign("attribute", UNFINISHED, "KV cache", "a pruned prefill that fills it is not finished", "the prefill's end"),
    *(
        Foreign(
            "attribute", name, "layer of the KV cache", "cache stage: cut to what stays of a prompt", "the cache's end"
        )
        for name in (KEYS, VALUES)
    ),
    Foreign("class", "", "KV cache", "a subclass that knows both lengths", "reset(), or the cache's own end"),
)
