"""Behind the prefill of a layer its visual keys and values are cut to a budget: memory is freed, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokprune.adapters.foreign import KEYS, VALUES
from tokprune.budget import kept
from tokprune.errors import TokpruneError, UnsupportedModelError
from tokprune.methods.cache.mustdrop_cache import survivors
from tokprune.methods.cache_base import CompactMethod, KeptKeys, LayerCache
from tokprune.runtime.decoder.attention import LayerInputs, RowAttention
from tokprune.runtime.decoder.candidates import Candidates
from tokprune.runtime.decoder.columns import LayerKeys
from tokprune.runtime.decoder.frame import Frame, Live, VisualCall


@dataclass
class Compaction:
    """A method that frees memory on one model.

    count: tokens of a picture with n of them whose keys stay, where ratio or budget are for this stage.
    """

    method: CompactMethod
    count: Callable[[int], int] | None = None
    freed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By layer: bytes of keys and values before and behind, of the last prefill."""

    def behind_layer(self, frame: Frame, prompt: VisualCall, layer: int, inputs: LayerInputs) -> None:
        """Ask the method about a layer that has read the prompt."""
        if self.method.follows or frame.cache is None or layer >= len(frame.cache.layers):
            return
        live = frame.live or prompt.live
        answers: list[KeptKeys | None] = []
        with torch.no_grad():
            for row, candidates in enumerate(prompt.candidates):
                keep = prompt.budgets[row]
                if keep is None:
                    keep = kept(candidates.total, self.method.share)
                keep = max(keep - candidates.fixed, 1)
                if keep >= len(candidates):
                    answers.append(None)
                    continue
                n, device = live.counts[row] - prompt.answer, inputs.pairs[0].device
                attention = RowAttention(inputs, row, live.fill(row), n, device)
                visual = live.find(row, candidates.slots).to(device)
                cache = LayerCache(layer, attention.keys[:, visual], attention.values[:, visual], attention, visual, n)
                answer = self.method.compact(cache, keep)
                if answer.indices.shape[-1] != keep:
                    raise TokpruneError(
                        f"method {self.method.info.name!r} kept {answer.indices.shape[-1]} keys of layer {layer} where "
                        f"{keep} were asked for."
                    )
                answers.append(answer)
            self._cut(frame, layer, live, prompt.candidates, answers)

    def behind_all(self, frame: Frame, prompt: VisualCall) -> None:
        """Cut layers to what the last drop of the decoder stage left."""
        if not self.method.follows or frame.cache is None or not prompt.drops:
            return
        with torch.no_grad():
            for layer in range(prompt.drops[0].layer - 1, prompt.drops[-1].layer):
                live = frame.live_in(layer) or prompt.live
                here = next(c for first, c in reversed(prompt.history) if first <= layer)
                answers = [
                    None if len(a) == len(b) else KeptKeys(survivors(b.slots, a.slots))
                    for a, b in zip(prompt.candidates, here, strict=True)
                ]
                self._cut(frame, layer, live, here, answers)

    def _cut(
        self, frame: Frame, layer: int, live: Live, candidates: list[Candidates], answers: list[KeptKeys | None]
    ) -> None:
        """Gather what stays of a layer's keys and values into tensors of their own. live: the tokens it worked on."""
        one = frame.cache.layers[layer]
        keys: Tensor = one.keys
        values: Tensor = one.values
        batch, heads, count = keys.shape[:3]
        known = frame.layers.get(layer)
        total = frame.past + frame.width
        slots = torch.arange(total, device=keys.device).expand(batch, -1) if known is None else known.slots
        if slots.shape[1] != count or type(one).__name__ != "DynamicLayer":
            raise UnsupportedModelError(
                f"{type(one).__name__} does not hold its keys as they are, so that none can be taken out; use the "
                f"default cache (DynamicCache) with {self.method.info.name!r}."
            )
        self.freed[layer] = (2 * keys.numel() * keys.element_size(),) * 2
        if all(answer is None for answer in answers):
            return
        slots = slots.to(keys.device)
        each = any(a is not None and (a.indices.ndim == 2 or a.keys is not None) for a in answers)
        numbers = torch.arange(count, device=keys.device)
        rows, lengths = [], []
        for row, answer in enumerate(answers):
            first = count - live.width
            real = torch.cat([numbers[:first], numbers[first + live.fill(row) :]])  # (K - filler,)
            index = real.expand(heads, -1)
            if answer is not None:
                at = torch.isin(slots[row, real], candidates[row].slots.to(keys.device) + frame.past)  # visual
                order = real[torch.argsort(at.int(), stable=True)]
                others, visual = order[: len(real) - len(candidates[row])], order[len(real) - len(candidates[row]) :]
                chosen = visual[answer.indices.to(keys.device)].expand(heads, -1)  # (H', k)
                index = torch.cat([others.expand(heads, -1), chosen], 1)
                index = index if each else index.sort(-1).values
            rows.append(index)
            lengths.append(index.shape[1])
        width = max(lengths)
        padded = torch.stack([torch.nn.functional.pad(r, (width - r.shape[1], 0), value=-1) for r in rows])
        new = []
        for states, name in ((keys, KEYS), (values, VALUES)):
            at = padded.clamp(min=0)[..., None].expand(-1, -1, -1, states.shape[-1])
            cut = states.gather(2, at)
            for row, answer in enumerate(answers):
                merged = None if answer is None else getattr(answer, name)
                if merged is not None:
                    cut[row, :, width - merged.shape[1] :] = merged.to(cut)
            new.append(cut)
        setattr(one, KEYS, new[0])
        setattr(one, VALUES, new[1])
        left = slots.gather(1, padded[:, 0].clamp(min=0)).masked_fill(padded[:, 0] < 0, -1)
        has_fill = min(lengths) < width or (known is not None and known.has_fill)
        moved = known is not None and known.moved
        frame.layers[layer] = LayerKeys(left, total, has_fill, moved, ordered=not each)
        self.freed[layer] = (self.freed[layer][0], 2 * new[0].numel() * new[0].element_size())
