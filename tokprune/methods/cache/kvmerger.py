"""KVMerger: visual keys that lie side by side and are alike become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.cache_base import CompactMethod, KeptKeys, LayerCache
from tokprune.methods.options import option
from tokprune.registry import Checked, register_method


def runs(keys: Tensor, keep: int) -> Tensor:
    """(H, V) number of the set that each key falls into, ascending from 0 to keep - 1: cuts lie where neighbours are
    least alike. keys: (H, V, d).
    """
    wide = torch.nn.functional.normalize(keys.float(), dim=-1)
    alike = (wide[:, 1:] * wide[:, :-1]).sum(-1)  # (H, V - 1)
    cuts = torch.sort(alike, dim=-1, stable=True).indices[:, : keep - 1] + 1
    first = torch.zeros(keys.shape[:2], dtype=torch.long, device=keys.device)
    return first.scatter(1, cuts, 1).cumsum(1)


def merged(keys: Tensor, values: Tensor, sets: Tensor, worth: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each set as one key and value, by the weights of a Gaussian around its pivot, the key of the largest worth.

    keys, values: (H, V, d). sets, worth: (H, V). Returns the pivots (H, keep), keys and values (H, keep, d).
    """
    heads = torch.arange(keys.shape[0], device=keys.device)[:, None]
    places = torch.arange(keys.shape[1], device=keys.device).expand_as(sets)
    best = torch.zeros(keys.shape[0], keep, dtype=worth.dtype, device=keys.device)
    best = best.scatter_reduce(1, sets, worth, "amax", include_self=False)
    candidate = torch.where(worth == best.gather(1, sets), places, keys.shape[1])
    pivot = torch.full((keys.shape[0], keep), keys.shape[1], dtype=torch.long, device=keys.device)
    pivot = pivot.scatter_reduce(1, sets, candidate, "amin")  # equal worth: the first
    away = (keys.float() - keys.float()[heads, pivot.gather(1, sets)]).square().sum(-1)  # (H, V)
    none = torch.zeros(keys.shape[0], keep, dtype=torch.float32, device=keys.device)
    size = none.scatter_add(1, sets, torch.ones_like(away))
    width = none.scatter_add(1, sets, away) / size  # (H, keep) mean squared distance of a set
    weight = torch.exp(-away / (2 * width.gather(1, sets)).clamp(min=1e-12))
    weight = weight / none.scatter_add(1, sets, weight).gather(1, sets)
    out = []
    for states in (keys, values):
        total = torch.zeros(keys.shape[0], keep, states.shape[-1], dtype=torch.float32, device=keys.device)
        at = sets[..., None].expand(-1, -1, states.shape[-1])
        out.append(total.scatter_add(1, at, states.float() * weight[..., None]).to(states.dtype))
    return pivot, out[0], out[1]


@register_method(
    "kvmerger",
    paper="Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks",
    year=2024,
    url="https://arxiv.org/abs/2407.08454",
    complexity="O(VD) per layer",
    memory="O(Hn + Vd)",
    merges=True,
    checked=Checked("", differs="written after the paper, for visual keys and an exact count; no code was found"),
)
@dataclass(frozen=True)
class KVMerger(CompactMethod):
    """KVMerger (2024, sections 3.2 and 3.3): in each head runs of similar keys are merged around the most attended one.

    Sets are runs of neighbouring keys; a set's key and value are means with the weights of a Gaussian of the distance
    to its pivot, the key to which the prompt pays most attention. retention: 0.5, the larger of the paper's budgets;
    `apply(..., ratio=)` sets it. Ours: sets are cut where neighbours are least alike, so that there are exactly as many
    as asked for, where the paper joins what is above a cosine of 0.75; visual keys alone are merged; the width of the
    Gaussian is a set's mean squared distance.
    """

    retention: float = option(0.5, above=0, high=1)

    def compact(self, cache: LayerCache, keep: int) -> KeptKeys:
        """Merge each head's keys to `keep`."""
        received = cache.attention.sums(torch.arange(cache.n, device=cache.visual.device), "each")[:, cache.visual]
        worth = received.unflatten(0, (cache.keys.shape[0], -1)).mean(1)  # (H', V)
        return KeptKeys(*merged(cache.keys, cache.values, runs(cache.keys, keep), worth, keep))
