"""Rows that keep different numbers, read in groups of like length: no filler runs through the LLM's prefill.

The LLM's own forward is called once a group, on the group's rows without the filler that all of them have, each group
with a cache of its own. What it returns goes back to the rows, hidden states and keys with filler on the left as if the
batch had run padded: decode steps, records and outputs do not know the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.adapters.dialect import CACHE, cache_in, cache_of, swap_cache
from tokprune.adapters.types import KVCache, ModelCall, ModelOutput
from tokprune.runtime.cache_record import physical_length

OVERHEAD = 75
"""What a call of the LLM costs beside its tokens, in tokens of a row: measured on a CPU with a small LLM
(benchmarks/results/grouping.json); larger ones lose less."""
PAYS = 0.9
"""Under "auto" rows are grouped where that leaves at most this share of the padded batch's columns."""
BY_ROW = ("inputs_embeds", "attention_mask", "position_ids")
FULL = "full_attention"
PLANES = ("visual_pos_masks", "deepstack_visual_embeds")


def like_lengths(lengths: Sequence[int], overhead: int = OVERHEAD) -> list[list[int]]:
    """Rows in groups of like length, at the least cost: a group costs its longest row times its rows, and `overhead`.

    Dynamic programming over the rows in order of length: best[j] is the cheapest way to cut the first j of them.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best, cut = [0.0], [0]
    for j in range(1, len(order) + 1):
        costs = [best[i] + lengths[order[j - 1]] * (j - i) + overhead for i in range(j)]
        cut.append(min(range(j), key=costs.__getitem__))
        best.append(costs[cut[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]


def why_padded(llm: nn.Module, call: ModelCall) -> str:
    """Why a call of the LLM runs padded where groups were asked for; "" where groups can be made."""
    cache, mask = cache_in(call), call.get("attention_mask")
    config: Any = llm.config
    known = (*BY_ROW, *PLANES, *CACHE)
    others = [k for k, v in call.items() if k not in known and not isinstance(v, bool | None | str)]
    asked = [
        name
        for name in ("output_attentions", "output_hidden_states")
        if (getattr(config, name, False) if call.get(name) is None else call[name])
    ]
    if asked:
        return f"{' and '.join(asked)} is asked for, whose tensors have one width"
    if llm.training:
        return "the model is in training mode"
    if not isinstance(call.get("inputs_embeds"), Tensor) or not isinstance(call.get("position_ids"), Tensor):
        return "the LLM is not given embeddings and positions"
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return "the mask tells more than which columns are filler"
    if others:
        return f"the LLM is given {', '.join(others)}, which cannot be cut into rows"
    if cache is not None and type(cache).__name__ != "DynamicCache":
        return f"keys go into a {type(cache).__name__}"
    if cache is not None and physical_length(cache):
        return "the cache holds earlier turns"
    kinds = getattr(config, "layer_types", None) or ["sliding" if getattr(config, "sliding_window", None) else FULL]
    if any(kind != FULL for kind in kinds):
        return "some layers have sliding windows or no attention"
    return ""


class Grouped:
    """One prefill of the LLM in groups. groups: rows of each, ascending. lengths: kept columns of each row."""

    def __init__(self, groups: Sequence[Sequence[int]], lengths: Sequence[int], call: ModelCall) -> None:
        self.call, self.cache = call, cache_in(call)
        self.groups = [(torch.tensor(rows), max(lengths[row] for row in rows)) for rows in groups]
        self.done: list[ModelOutput] = []

    @property
    def columns(self) -> int:
        """Columns that run, of all groups."""
        return sum(len(rows) * width for rows, width in self.groups)

    def begin(self, llm: nn.Module) -> ModelCall:
        """Run all groups but the last, and return the call of that one."""
        for rows, width in self.groups[:-1]:
            self.done.append(llm.forward(**self._part(rows, width)))
        return self._part(*self.groups[-1])

    def finish(self, last: ModelOutput) -> ModelOutput:
        """The output of the whole batch, from that of the last group; fills the cache that the call came with."""
        outputs = [*self.done, last]
        last.last_hidden_state = self._whole([output.last_hidden_state for output in outputs])
        caches = [cache_of(output) for output in outputs]
        if caches[0] is None:
            return last
        whole = self._empty() if self.cache is None else self.cache  # without one, each call made its own
        for i in range(len(caches[0].layers)):
            keys, values = ([getattr(c.layers[i], name) for c in caches] for name in ("keys", "values"))
            whole.update(self._whole(keys), self._whole(values), i)
        last[next(name for name in CACHE if name in last)] = whole
        return last

    def _part(self, rows: Tensor, width: int) -> ModelCall:
        """The call of one group."""
        part = dict(self.call)
        at = rows.to(part["inputs_embeds"].device)
        part["inputs_embeds"] = part["inputs_embeds"][at, -width:]  # (G, W, D)
        part["attention_mask"] = part["attention_mask"][at, -width:]
        positions = part["position_ids"]  # (B, P), or (axes, B, P)
        part["position_ids"] = positions[..., at, :][..., -width:]
        where = part.get(PLANES[0])
        if where is not None:  # the rows of each plane lie in the order of the columns that it adds to
            mine = torch.zeros(where.shape[0], dtype=torch.bool, device=where.device)
            mine[at] = True
            part[PLANES[0]] = where[at, -width:]
            part[PLANES[1]] = [plane[mine[:, None].expand_as(where)[where]] for plane in part[PLANES[1]]]
        return part if self.cache is None else swap_cache(part, self._empty())

    def _empty(self) -> KVCache:
        """An empty cache of the kind that the call came with."""
        from transformers import DynamicCache

        return DynamicCache()

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Hidden states (G, W, D) or keys (G, H, W, D) of the groups, as those of the batch; filler is zero."""
        width, (first, *_) = self.call["inputs_embeds"].shape[1], parts
        batch = sum(len(rows) for rows, _ in self.groups)
        whole = first.new_zeros(batch, *first.shape[1:-2], width, first.shape[-1])
        for (rows, _), part in zip(self.groups, parts, strict=True):
            at = rows.to(part.device)
            filler = part.new_zeros(*part.shape[:-2], width - part.shape[-2], part.shape[-1])
            whole = whole.index_copy(0, at, torch.cat([filler, part], -2))
        return whole


def grouped(llm: nn.Module, call: ModelCall, lengths: Sequence[int], packing: str) -> tuple[Grouped | None, str]:
    """How the rows of a prefill are grouped, None where they run padded, and what the report says of it."""
    if packing == "padded" or len(set(lengths)) < 2:
        return None, ""
    made = Grouped(like_lengths(lengths), lengths, call)
    padded = len(lengths) * max(lengths)
    if len(made.groups) < 2 or (packing == "auto" and made.columns > PAYS * padded):
        return None, ""
    why = why_padded(llm, call)
    if why:
        return None, f"rows ran padded: {why}"
    groups = f"{len(lengths)} rows ran in {len(made.groups)} groups of like length"
    return made, f"{groups}: {made.columns} columns of {padded}"
