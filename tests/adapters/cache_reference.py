"""What a model with a cache method must compute, worked out with masks on an eager twin, one prompt at a time.

Nothing is gathered, and the attention that tells comes from the twin's own attention maps. The connector stage, which
has a reference of its own, may have pruned the twin before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import language_model
from tests.spelling import cache_in
from tokprune.budget import kept
from tokprune.testing import TinyVLM, build


@functools.lru_cache(None)
def eager(family: str) -> TinyVLM:
    """The shared model of a family again, with attention maps."""
    return build(family, attn="eager")


def last_layer(tiny: TinyVLM) -> int:
    """Number of the last decoder layer."""
    return len(language_model(tiny.model).layers) - 1


def answer(tiny: TinyVLM, inputs: Any, new: int, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens (B, T) and the logits (B, T, V) that they were chosen from."""
    more = {"return_dict_in_generate": True, "output_logits": True, **options}
    out = tiny.model.generate(**inputs, max_new_tokens=new, **more)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@dataclass
class Masked:
    """Decode steps in which attention layers from `layer` on do not see the dropped visual keys.

    visual: physical positions of the visual keys of the one prompt. keep: how many of them a step sees. Below
    `similarity` to the attention of the step before a new set is chosen, the `full` cache or the earlier set is taken
    above it.
    """

    model: Any
    layer: int
    keep: int
    similarity: float = 0.9
    full: bool = False
    visual: list[int] = field(default_factory=list)
    sets: list[set[int]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    lost: int = 0  # visual keys that a sliding window has let go of
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Masked:
        attentions = [
            (i, a.self_attn) for i, a in enumerate(language_model(self.model).layers) if hasattr(a, "self_attn")
        ]
        source = [a for i, a in attentions if i < self.layer][-1]
        self._handles.append(source.register_forward_hook(self._decide, with_kwargs=True))
        for i, attention in attentions:
            if i >= self.layer:
                self._handles.append(attention.register_forward_pre_hook(self._hide, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _decide(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs["hidden_states"].shape[1] > 1:
            self.rows, self.sets = [], []
            return
        weights = output[1][0].mean(0)[0]
        gone = cache_in(kwargs).layers[module.layer_idx].get_seq_length() - len(weights)
        row = torch.stack([weights[p - gone] if p >= gone else weights.new_zeros(()) for p in self.visual])
        fresh = set(sorted(range(len(row)), key=lambda j: (-float(row[j]), j))[: self.keep])
        if self.rows and float(torch.cosine_similarity(row, self.rows[-1], 0)) >= self.similarity:
            fresh = set(range(len(row))) if self.full else self.sets[-1]
        self.rows.append(row)
        self.sets.append(fresh)

    def _hide(self, module: Any, args: Any, kwargs: Any) -> Any:
        if kwargs["hidden_states"].shape[1] > 1:
            return None
        cache, dtype = cache_in(kwargs), kwargs["hidden_states"].dtype
        length, _ = cache.get_mask_sizes(1, module.layer_idx)
        mask = torch.zeros(1, 1, 1, length, dtype=dtype)
        if kwargs.get("attention_mask") is not None:
            mask = mask + kwargs["attention_mask"]
        held = cache.layers[module.layer_idx].get_seq_length() + 1
        gone = [p - (held - length) for j, p in enumerate(self.visual) if j not in self.sets[-1]]
        self.lost += sum(p < held - length for p in self.visual)
        mask[..., [p for p in gone if p >= 0]] = torch.finfo(dtype).min
        return args, {**kwargs, "attention_mask": mask}


class Forced:
    """A logits processor that writes given tokens (T,), then anything."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1] - self.prompt
        if at >= len(self.tokens):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, self.tokens[at].view(1), 0.0)


@torch.no_grad()
def masked_steps(
    family: str,
    inputs: Any,
    forced: Tensor,
    layer: int,
    share: float,
    ratio: float | None = None,
    similarity: float = 0.9,
    full: bool = False,
    positions: str = "auto",
) -> tuple[Tensor, Masked]:
    """Logits (T, V) after each of `forced` (T,) tokens behind one prompt. ratio: of the random connector before."""
    twin = eager(family).model
    ids = inputs["input_ids"]
    more = {"return_dict_in_generate": True, "output_logits": True, "logits_processor": [Forced(forced, ids.shape[1])]}
    with tokprune.apply(twin, "random", ratio=1.0 if ratio is None else ratio, positions=positions) as pruning:
        twin.generate(**inputs, max_new_tokens=1)
        last = pruning.last
        columns = last.keep[0].nonzero().flatten().tolist()
        candidates = {c for s in last.streams for c in s.candidates.tolist()}
        visual = [i for i, c in enumerate(columns) if c in candidates]
        with Masked(twin, layer, kept(len(visual), share), similarity, full, visual) as reference:
            out = twin.generate(**inputs, max_new_tokens=len(forced) + 1, **more)
    assert torch.equal(out.sequences[0, ids.shape[1] : -1], forced)
    return torch.stack(out.logits[1:], 1)[0], reference
