"""The encoder stage: token reduction inside vision towers, attached by hooks."""

from __future__ import annotations

from tokprune.adapters.splice.handle import EncoderPruning, apply_encoder, remove_encoder
from tokprune.adapters.splice.run import EncoderTrace

__all__ = ["EncoderPruning", "EncoderTrace", "apply_encoder", "remove_encoder"]
