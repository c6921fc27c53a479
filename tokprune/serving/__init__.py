"""Pruning inside vLLM: out-of-tree models that keep a share of the visual tokens, and embeddings pruned here for a
server elsewhere.

vllm serve CKPT --hf-overrides '{"architectures": ["TokpruneLlavaForConditionalGeneration"],
                                 "tokprune": {"method": "divprune", "ratio": 0.25}}'

The methods are those of `tokprune.methods`; nothing of vLLM's is replaced. docs/serving.md says what holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokprune.serving.plugin import ARCHITECTURES, overrides, register

if TYPE_CHECKING:
    from tokprune.serving.embeds import encode

__all__ = ["ARCHITECTURES", "encode", "overrides", "register"]


def __getattr__(name: str) -> Any:
    """`encode` on first use: vLLM imports this package in all its processes."""
    if name == "encode":
        from tokprune.serving.embeds import encode

        return encode
    raise AttributeError(f"module 'tokprune.serving' has no attribute {name!r}")
