"""What a pruned forward gives back, at the width of the prompt as it was written.

One rule for forward() and generate(): whatever has one row per prompt token (logits, hidden states) has the prompt's width,
and a dropped token answers with the nearest kept one before it. Attentions are what was computed: queries and keys that
were kept, `pruning.last.keep` says which.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def widen(hidden: Tensor, expand: Tensor) -> Tensor:
    """Hidden states (B, P, D) of kept tokens as (B, L, D). expand: (B, L) slot that answers for each column."""
    index = expand.to(hidden.device)[..., None]
    return hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))


def widen_output(output: Any, expand: Tensor, last: bool) -> None:
    """Widen the hidden states of a base model's output in place. last: the last one, too, which generate() does not need."""
    states = output.get("hidden_states")
    tied = None
    if last:
        tied, output.last_hidden_state = output.last_hidden_state, widen(output.last_hidden_state, expand)
    if states is not None:
        output.hidden_states = tuple(
            None if h is None else output.last_hidden_state if h is tied else widen(h, expand) for h in states
        )
