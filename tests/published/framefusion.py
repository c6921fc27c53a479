"""FrameFusion as its authors run it: one call before the first layer of the LLM and one behind the attention of
each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokprune.errors import BudgetError, OptionError
from tokprune.methods.connector.framefusion import FIRST, TEXT, framefusion_heads, framefusion_similarity
from tokprune.ops.topk import ranks, top_by_tier
from tokprune.tokens import Merge


class Fusion(NamedTuple):
    """How far the published procedure is: shares merged by the calls so far, and which of its two parts are over."""

    sparsities: tuple[float, ...] = ()
    merged: bool = False
    pruned: bool = False


def framefusion_sparsity(done: Sequence[float], cost: float, layers: int = 28) -> float:
    """Share of the tokens that has to go now, so that all `layers` together cost the share `cost` (section 3.4).

    done: shares removed by each layer so far. The published code counts 28 layers for every model.
    """
    left, spent = 1.0, 0.0
    for share in done:
        left *= 1 - share
        spent += left
    ahead = cost * layers - spent
    if ahead < 0:
        raise BudgetError(
            f"cost={cost} is too small: {len(done)} layers have already taken {spent / layers:.3f} of the whole."
        )
    return max(0.0, 1 - ahead / ((layers - len(done)) * left))


def framefusion_merge(hidden: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that are left, each the mean of those that flow into it. heads: (L,) -> positions (K,), tokens (K,
    C)."""
    at = torch.arange(len(heads), device=heads.device)
    kept = (heads == at).nonzero()[:, 0]
    slot = torch.searchsorted(kept, heads)
    size = torch.zeros(len(kept), device=heads.device).index_add(0, slot, torch.ones_like(slot, dtype=torch.float32))
    return kept, Merge(target=slot, scale=1 / size[slot]).apply(hidden, len(kept))


def framefusion_step(
    hidden: Tensor,
    patch: Tensor,
    state: Fusion,
    cost: float,
    attention: Tensor | None = None,
    threshold: float = 0.6,
    least: float = 0.1,
    layers: int = 28,
) -> tuple[Tensor, Tensor, Fusion]:
    """One call of the published procedure: before the first layer of the LLM, and behind the attention of each.

    hidden: (L, C), patch: (L,). attention: (L,) mean over heads and queries of what each token receives; read by the
    one call that prunes. While it merges: the tokens of at least `threshold`, or, when these are more than have to go,
    the most similar ones as many as that, and all is over. Merging ends when less than the share `least` is above. The
    call after that prunes.

    Returns the positions that are left (K,), their tokens (K, C) and the new state.
    """
    visual = patch != TEXT
    count = int(visual.sum())
    everything = torch.arange(len(patch), device=patch.device)
    if not state.merged:
        share = framefusion_sparsity(state.sparsities, cost, layers)
        similarity = framefusion_similarity(hidden, patch)
        above = similarity >= threshold
        found = int(above.sum()) / max(count, 1)
        if found < share:
            state = Fusion((*state.sparsities, found), merged=found < least)
        else:
            above = ranks(similarity) < int(share * count)
            state = Fusion(state.sparsities, merged=True, pruned=True)
        kept, out = framefusion_merge(hidden, framefusion_heads(patch, above & (similarity > FIRST)))
        return kept, out, state
    if not state.pruned:
        if attention is None:
            raise OptionError("this call prunes: give the attention that each token received, (L,).")
        keep = round(count * (1 - framefusion_sparsity(state.sparsities, cost, layers)))
        kept = top_by_tier((~visual).long(), attention, len(patch) - count + keep)
        return kept, hidden[kept], state._replace(pruned=True)
    return everything, hidden, state
