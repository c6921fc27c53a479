"""An LLM's FLOPs counted by torch as it runs, for the closed forms to be held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokprune.adapters.dialect import as_cache, cache_of
from tokprune.profiling.flops import new_counter


def language_flops(
    language: nn.Module, head: nn.Module | None, tokens: int, batch: int = 1, **call: object
) -> tuple[int, int]:
    """FLOPs of the LLM's prefill over `tokens` embeddings and of one decode step after it; meta device allowed.

    language: a transformers decoder without head. head: the output head, run on the last position only (as `generate`
    does). call: more arguments of its forward.
    """
    reference = next(language.parameters())
    width = int(language.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]

    def embeddings(n: int) -> Tensor:
        return torch.empty(batch, n, width, device=reference.device, dtype=reference.dtype)

    with torch.no_grad(), new_counter() as counter:
        out = language(inputs_embeds=embeddings(tokens), use_cache=True, **call)
        if head is not None:
            head(out.last_hidden_state[:, -1:])
        prefill = counter.get_total_flops()
        out = language(inputs_embeds=embeddings(1), use_cache=True, **as_cache(type(language).forward, cache_of(out)))
        if head is not None:
            head(out.last_hidden_state[:, -1:])
        return prefill, counter.get_total_flops() - prefill
