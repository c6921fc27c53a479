"""Pruning inside vLLM: out-of-tree models that keep a share of the visual tokens, and embeddings pruned here for a
server elsewhere.

vllm serve CKPT --hf-overrides '{"architectures": ["TokpruneLlavaForConditionalGeneration"],
                                 "tokprune": {"method": "divprune", "ratio": 0.25}}'

The methods are those of `tokprune.methods`; nothing of vLLM's is replaced. docs/serving.md says what holds.
"""

from __future__ import annotations

from tokprune.serving.plugin import ARCHITECTURES, overrides, register

__all__ = ["ARCHITECTURES", "overrides", "register"]
